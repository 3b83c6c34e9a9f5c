"""The demo: a real model, a prefill process, a shaped link, a decode process."""
