"""Durable storage of a run: keys, objects, manifests, tables, tensors, runs and retention.

Pure IO over fsspec. What is committed is never overwritten; readers go by manifest and verify.
"""
