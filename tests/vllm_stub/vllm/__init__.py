"""As much of vLLM 0.32.0 as the connector imports, for tests: names and signatures only, no code of it.

`benchmarks/vllm_e2e/stub.py` compares it with the real one.
"""

__version__ = "0.32.0"
