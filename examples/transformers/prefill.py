"""The prefill side: computes a prompt's KV cache and sends each layer as soon as it exists. Start decode.py first.

python prefill.py MODEL tcp://127.0.0.1:7411 "Once upon a time"
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from lynxproto.integrations.hf import LynxCache

folder, url, text = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
input_ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
cache, result, stats = LynxCache.prefill(model, input_ids, url)
print(f"sent {input_ids.shape[1]} tokens' cache in {stats.bytes} bytes; the first token is {result.first_token}")
