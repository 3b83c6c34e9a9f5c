"""The decode side: takes a prompt's cache from prefill.py, drafts while it arrives, and prints what generate would.

python decode.py MODEL tcp://127.0.0.1:7411 "Once upon a time"
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from lynxproto.integrations.hf import LynxCache, generate

folder, url, text = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
input_ids = tokenizer(text, return_tensors="pt").input_ids
reports = []
with LynxCache.listen(url, model) as receiver:
    print(f"listening on {receiver.url}", flush=True)
    output = generate(model, input_ids, receiver, max_new_tokens=40, do_sample=False, on_report=reports.append)
print(tokenizer.decode(output[0, input_ids.shape[1] :]))
print(f"accepted {reports[0].accepted} of {reports[0].drafted} drafts", file=sys.stderr)
