"""The schema of recipes: every key, what it means, and a neutral default.

configs/cifar.py has the values of the paper. A recipe calls `get_config` of
another recipe and changes what differs.
"""

from ml_collections import ConfigDict
from ml_collections import FieldReference


def get_config() -> ConfigDict:
  c = ConfigDict()
  c.seed = 0  # of all randomness: weights, order of data, noise, samples
  c.steps = 100_000  # optimiser steps in total
  c.batch_size = 64  # images per step, over all devices
  # Number of parts that a batch is processed in, one by one, to save memory. On
  # CPUs, gradients inside a loop are ten times slower.
  c.accumulate = 1

  c.data = ConfigDict()
  c.data.name = 'folder'  # digits | tfds | folder | arrays | points
  c.data.tfds = 'cifar10'  # name of the data set, for `tfds`
  # Folder of images | .npz or .npy | TFDS folder ('': the default of TFDS).
  c.data.path = ''
  c.data.split = 'train'  # for `tfds`; the others have no splits
  c.data.points = 'swiss_roll'  # | two_moons | eight_gaussians; for `points`
  # Side, or (height, width), in pixels; () for points.
  c.data.image_size = FieldReference(32, field_type=object)
  c.data.channels = 3  # 1: gray, 3: RGB; coordinates of a point
  # Source of captions: '': none | classes (templates with class names) | file
  # (metadata.jsonl or captions.csv in a folder) | a text feature, for `tfds`.
  c.data.captions = ''
  c.data.templates = ('{}', 'a {}', 'a picture of a {}')
  c.data.names = ()  # of the classes, for captions; (): those of the data
  c.data.flip = False  # mirror half of the images, left to right
  c.data.max_unreadable = 10  # more unreadable image files are an error
  # Value of white in 16-bit images: 4095 for 12 bits. 0: from the smallest of
  # 8, 10, 12, 14 and 16 bits that holds the largest value of the data.
  c.data.max_value = 0

  c.model = ConfigDict()
  c.model.name = 'unet'  # | mlp (for points)
  # What the network predicts: eps | x0 | v | mu.
  c.model.predict = 'eps'
  # Variance of p(x_{t-1} | x_t): beta ("fixed large") | beta_tilde ("fixed
  # small") | learned | learned_range (between these two).
  c.model.variance = 'beta'
  c.model.channels = 128  # of the first level; width of every layer of an mlp
  c.model.multipliers = (1, 2, 2, 2)  # of `channels`, one per level
  # Residual blocks per level going down, one more going up; layers of an mlp.
  c.model.blocks = 2
  c.model.attention = (16,)  # sides of the levels with attention after blocks
  c.model.groups = 32  # groups of group normalisation
  c.model.dropout = 0.1
  c.model.dtype = 'float32'  # of activations: float32 | bfloat16
  c.model.remat = False  # recompute blocks in the backward pass: less memory
  # Side of the squares of pixels that become one pixel with more channels, for
  # large images: 2 is four times cheaper, and coarser.
  c.model.patch = 1

  c.condition = ConfigDict()  # input of the network besides x_t and t
  # '': none | label (the class) | text (encoded by a small transformer that is
  # trained with the network) | minilm (text, encoded by a frozen network).
  c.condition.name = ''
  c.condition.drop = 0.1  # share of training examples without condition
  c.condition.classes = 0  # for label; 0: as many as the data have
  c.condition.length = 64  # most bytes of a text; minilm: word pieces, 16 do
  c.condition.width = 128  # of the encoder's states
  c.condition.depth = 2  # layers of the encoder, for text

  c.schedule = ConfigDict()
  # A function of ddpm_jax/diffusion/schedules.py: linear | cosine | quad | su
  # | const | sqrt | scaled_linear | sqrt_linear | warmup10 | warmup50 | jsd
  # (not with eps).
  c.schedule.name = 'linear'
  c.schedule.T = 1000
  c.schedule.beta_1 = 1e-4  # for linear and similar schedules
  c.schedule.beta_T = 0.02  # the only one if T = 1
  # Shift it so that x_T is pure noise (Lin et al. 2023); not with eps.
  c.schedule.zero_terminal_snr = False
  c.schedule.s = 0.008  # for cosine: keeps β_1 from being tiny

  c.loss = ConfigDict()
  # A function of ddpm_jax/diffusion/losses.py: simple (eq. 14; the error of the
  # mean if predict = 'mu') | vlb (the true bound) | hybrid | min_snr
  # | two_noise, one_noise, x_prev (derivations of eq. 14, for study).
  c.loss.name = 'simple'
  # How t is drawn: uniform | antithetic | stratified | importance (by past
  # losses; for vlb, whose terms differ by factors of thousands).
  c.loss.t = 'uniform'
  c.loss.gamma = 5.0  # for min_snr: the largest weight

  c.optimizer = ConfigDict()  # Adam
  c.optimizer.learning_rate = 2e-4
  c.optimizer.warmup = 0  # steps; the learning rate rises linearly from 0
  # How it falls after that, to 0 at `steps`: '': not at all | linear | cosine.
  c.optimizer.decay = ''
  c.optimizer.beta_1 = 0.9
  c.optimizer.beta_2 = 0.999
  c.optimizer.eps = 1e-8
  c.optimizer.clip = 1.0  # largest global norm of the gradient
  c.optimizer.ema = 0.999  # decay per step of the averaged weights

  c.sampler = ConfigDict()
  # A function of ddpm_jax/diffusion/samplers.py: ancestral (the paper) | greedy
  # | ddim | dpm_solver_pp_2m | dpm_solver_pp_2m_sde | heun (two network
  # evaluations per step).
  c.sampler.name = 'ancestral'
  # At most T. Follows schedule.T until it is set.
  c.sampler.steps = c.schedule.get_oneway_ref('T')
  # Times of fewer steps: linear ("trailing": even, from T) | quadratic (denser
  # near the image, from T) | leading, quad (as in DDIM's code; from below T).
  c.sampler.spacing = 'linear'
  c.sampler.eta = 0.0  # for ddim: 0 (deterministic) to 1 (like ancestral)
  # Follows model.variance until it is set; may swap beta and beta_tilde.
  c.sampler.variance = c.model.get_oneway_ref('variance')
  c.sampler.clip = True  # clip the predicted x_0 to [-1, 1] at every step
  # Weight of the condition: 1 as it is, 0 none, larger exaggerates it
  # (classifier-free guidance; two network evaluations per step).
  c.sampler.guidance = 1.0
  c.sampler.guidance_interval = (0.0, 1.0)  # of t / T, where guidance applies
  c.sampler.guidance_rescale = 0.0  # to 1: restores the unguided contrast
  # Weights of a checkpoint: ema (running average) | raw (as trained).
  c.sampler.weights = 'ema'
  c.sampler.batch_size = 256  # images at a time, over all devices

  c.edit = ConfigDict()  # inpainting with a mask (RePaint)
  # Length of a jump back, in steps; none if it is not below sampler.steps.
  c.edit.jump = 10
  # How often a step is taken, except for the first few and the last.
  c.edit.resample = 10

  c.codec = ConfigDict()
  c.codec.steps = 30  # that x_1 is sent in; more are finer, and slower
  # A group of dimensions is sent as one of 2^this candidates. One more doubles
  # the time, and allows one more bit per group.
  c.codec.log2_candidates = 14
  # Largest KL of a group, in bits. Larger groups take less space in total, but
  # are inexact above about log2_candidates - 6.
  c.codec.group_bits = 8.0
  c.codec.batch_size = 64  # images at a time, on one device

  c.evaluate = ConfigDict()
  c.evaluate.split = ''  # for `tfds`; '': the training split
  c.evaluate.images = 0  # number of images; 0: all
  c.evaluate.draws = 0  # times t per image; 0: all T of them
  c.evaluate.batch_size = 256  # images at a time, over all devices
  c.evaluate.weights = ''  # ema | raw; '': those of sampler.weights
  # How FID and the like resize images to 299 x 299: tensorflow | pytorch_fid;
  # see ddpm_jax/metrics/inception.py.
  c.evaluate.resize = 'tensorflow'
  # Samples, and as many real images, whose features are compared pairwise, for
  # KID, precision and recall; the time grows with the square.
  c.evaluate.neighbours = 10_000
  # Folder for statistics of data sets; '': `reference` next to the workdir.
  c.evaluate.cache = ''

  c.parallel = ConfigDict()
  c.parallel.engine = 'jit'  # jit | pmap
  c.parallel.data = -1  # devices that share the batch; -1: all remaining
  c.parallel.fsdp = 1  # devices that share one copy of the state
  c.parallel.spatial = 1  # devices that share the rows of an image

  c.checkpoint = ConfigDict()
  c.checkpoint.every = 1000  # steps
  c.checkpoint.keep = 3  # newest ones
  c.checkpoint.keep_every = 0  # steps; these are never deleted. 0: none

  c.log = ConfigDict()
  # Steps between lines of metrics.jsonl: loss, grad_norm, learning_rate,
  # images_per_second, and seconds of training without compiling and sampling.
  c.log.every = 100
  # Steps between grids of samples (also in TensorBoard); 0: at the end only.
  c.log.pictures_every = 0
  # Sampler steps of these grids, if fewer than sampler.steps; 0: as many.
  c.log.pictures_steps = 0
  c.log.wandb = ''  # project of Weights & Biases to log to as well; '': none
  return c.lock()
