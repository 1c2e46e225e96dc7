"""The schema of recipes: every key, what it means, and a neutral default.

configs/cifar.py has the values of the paper. A recipe is a call to another's
`get_config` and its differences.
"""

from ml_collections import ConfigDict
from ml_collections import FieldReference


def get_config() -> ConfigDict:
  c = ConfigDict()
  c.seed = 0  # of everything random: weights, order of data, noise, samples
  c.steps = 100_000  # optimiser steps in all
  c.batch_size = 64  # images a step, over all devices
  # Parts that a batch is worked through in, to save memory. On CPUs gradients
  # inside a loop are ten times slower.
  c.accumulate = 1

  c.data = ConfigDict()
  c.data.name = 'folder'  # digits | tfds | folder | arrays | points
  c.data.tfds = 'cifar10'  # name of the data set, for `tfds`
  c.data.path = (
    ''  # folder of images | .npz or .npy | TFDS folder ('': its own)
  )
  c.data.split = 'train'  # for `tfds`; the others have no splits
  c.data.points = 'swiss_roll'  # | two_moons | eight_gaussians, for `points`
  # Side, or (height, width), in pixels; () for points. Of any type.
  c.data.image_size = FieldReference(32, field_type=object)
  c.data.channels = 3  # 1: gray, 3: RGB; coordinates of a point
  # Texts to images: classes (templates with their names) | file (of a folder:
  # metadata.jsonl or captions.csv) | a feature of texts, for `tfds`.
  c.data.captions = ''
  c.data.templates = ('{}', 'a {}', 'a picture of a {}')
  c.data.names = ()  # of the classes, in captions; (): those of the data
  c.data.flip = False  # mirror half of the images, left to right
  c.data.max_unreadable = 10  # image files that may be broken before we stop
  # Of 16-bit images, the value that is white: 4095 for 12 bits. 0: the smallest
  # of 8, 10, 12, 14 and 16 bits that holds the largest value of the data.
  c.data.max_value = 0

  c.model = ConfigDict()
  c.model.name = 'unet'  # | mlp (for points)
  # What the network predicts: eps | x0 | v | mu.
  c.model.predict = 'eps'
  # Of p(x_{t-1} | x_t): beta ("fixed large") | beta_tilde ("fixed small") |
  # learned | learned_range (between the two).
  c.model.variance = 'beta'
  c.model.channels = 128  # of the first level; of every layer of an mlp
  c.model.multipliers = (1, 2, 2, 2)  # of `channels`, a level each
  # Residual blocks a level going down, one more going up; layers of an mlp.
  c.model.blocks = 2
  c.model.attention = (16,)  # sides of levels where attention follows a block
  c.model.groups = 32  # of group normalisation
  c.model.dropout = 0.1
  c.model.dtype = 'float32'  # of activations: float32 | bfloat16
  c.model.remat = False  # recompute blocks in the backward pass: less memory
  # Side of the squares of pixels that the network sees as one, of more
  # channels: 2 is four times cheaper, and coarser; for large images.
  c.model.patch = 1

  c.condition = ConfigDict()  # what the network is told beside x_t and t
  # '': nothing | label (the class) | text (read by a small transformer that is
  # trained along) | minilm (by a frozen one).
  c.condition.name = ''
  c.condition.drop = 0.1  # share of examples that are told nothing, in training
  c.condition.classes = 0  # of label; 0: as many as the data have
  c.condition.length = 64  # most bytes of a text; word pieces of minilm: 16 do
  c.condition.width = 128  # of the encoder's states
  c.condition.depth = 2  # layers of the encoder of text

  c.schedule = ConfigDict()
  # A function of ddpm_jax/diffusion/schedules.py: linear | cosine | quad | su
  # | const | sqrt | scaled_linear | sqrt_linear | warmup10 | warmup50 | jsd
  # (not with eps).
  c.schedule.name = 'linear'
  c.schedule.T = 1000
  c.schedule.beta_1 = 1e-4  # of linear and those like it
  c.schedule.beta_T = 0.02  # with T = 1, that of the only step
  # Shift it so that x_T is noise alone (Lin et al. 2023); not with eps.
  c.schedule.zero_terminal_snr = False
  c.schedule.s = 0.008  # of cosine: what keeps β_1 from being tiny

  c.loss = ConfigDict()
  # A function of ddpm_jax/diffusion/losses.py: simple (eq. 14; with
  # predict = 'mu' the error of the mean) | vlb (the true bound) | hybrid
  # | min_snr | two_noise, one_noise, x_prev (derivations of eq. 14, for study).
  c.loss.name = 'simple'
  # How t is drawn: uniform | antithetic | stratified | importance (by the
  # losses of the past; for vlb, whose terms differ by thousands).
  c.loss.t = 'uniform'
  c.loss.gamma = 5.0  # of min_snr: the largest weight

  c.optimizer = ConfigDict()  # Adam
  c.optimizer.learning_rate = 2e-4
  c.optimizer.warmup = 0  # steps; the learning rate rises linearly from 0
  c.optimizer.beta_1 = 0.9
  c.optimizer.beta_2 = 0.999
  c.optimizer.eps = 1e-8
  c.optimizer.clip = 1.0  # global norm of the gradient
  c.optimizer.ema = 0.999  # decay, a step, of the weights that sample

  c.sampler = ConfigDict()
  # A function of ddpm_jax/diffusion/samplers.py: ancestral (the paper) | greedy
  # | ddim | dpm_solver_pp_2m | dpm_solver_pp_2m_sde | heun (which asks the
  # network twice a step).
  c.sampler.name = 'ancestral'
  # T, or fewer. (One way: setting it leaves T alone.)
  c.sampler.steps = c.schedule.get_oneway_ref('T')
  # Of fewer: linear ("trailing": even, from T on) | quadratic (denser near the
  # image, from T on) | leading, quad (both as in DDIM's code; begin below T).
  c.sampler.spacing = 'linear'
  c.sampler.eta = 0.0  # of ddim: 0 (x_T decides) to 1 (as random as ancestral)
  # beta and beta_tilde may stand for each other when it comes to sampling.
  c.sampler.variance = c.model.get_oneway_ref('variance')
  c.sampler.clip = True  # the predicted x_0 to [-1, 1], at every step
  # How much of the condition: 1 as it is, 0 none, more than 1 exaggerates
  # (classifier-free guidance; the network is asked twice a step).
  c.sampler.guidance = 1.0
  c.sampler.guidance_interval = (0.0, 1.0)  # of t / T, where that counts
  c.sampler.guidance_rescale = 0.0  # to 1: the contrast of no guidance
  # Of a checkpoint: ema (their running average) | raw (as they are trained).
  c.sampler.weights = 'ema'
  c.sampler.batch_size = 256  # images at a time, over all devices

  c.edit = ConfigDict()  # of an image with a mask (RePaint)
  # Steps back, to take them again; with as many steps or more there are none.
  c.edit.jump = 10
  # Times that a step is taken, but for the first few and the last.
  c.edit.resample = 10

  c.codec = ConfigDict()
  c.codec.steps = 30  # that x_1 is told in; the more, the finer, and the slower
  # A group of dimensions is told as one of 2^this candidates. One more takes
  # twice the time, and lets groups have a bit more.
  c.codec.log2_candidates = 14
  # The most that KL of a group is, in bits; larger groups take less room in
  # all, but above some 6 bits below the candidates' they are no more exact.
  c.codec.group_bits = 8.0
  c.codec.batch_size = 64  # images at a time, on one device

  c.evaluate = ConfigDict()
  c.evaluate.split = ''  # for `tfds`; '': the one that was trained on
  c.evaluate.images = 0  # how many of them; 0: all
  c.evaluate.draws = 0  # times t an image; 0: all T of them
  c.evaluate.batch_size = 256  # images at a time, over all devices
  c.evaluate.weights = ''  # ema | raw; '': those of sampler.weights
  # Of FID and the like: how images come to 299 x 299, tensorflow | pytorch_fid;
  # see ddpm_jax/metrics/inception.py.
  c.evaluate.resize = 'tensorflow'
  # Images of each side whose features are compared one by one, for KID,
  # precision and recall; the time grows with the square.
  c.evaluate.neighbours = 10_000
  # Folder of statistics of data sets; '': `reference` beside the workdir.
  c.evaluate.cache = ''

  c.parallel = ConfigDict()
  c.parallel.engine = 'jit'  # jit | pmap
  c.parallel.data = -1  # devices along the batch; -1: all that are left
  c.parallel.fsdp = 1  # devices that share one copy of the state
  c.parallel.spatial = 1  # devices that share an image, its rows

  c.checkpoint = ConfigDict()
  c.checkpoint.every = 1000  # steps
  c.checkpoint.keep = 3  # newest ones
  c.checkpoint.keep_every = 0  # steps; these are kept for good. 0: none

  c.log = ConfigDict()
  # Steps between lines of metrics.jsonl: loss, grad_norm, learning_rate,
  # images_per_second, and seconds of training, without compiling and drawing.
  c.log.every = 100
  # Steps between grids of samples (also in TensorBoard); 0: at the end only.
  c.log.pictures_every = 0
  c.log.wandb = ''  # project of Weights & Biases to log to as well; '': none
  return c.lock()
