"""Benchmarks, one module an op: ``python -m bench.int8_gemm --device cpu``."""
