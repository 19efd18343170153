"""Helpers that know nothing of captioning: files, paths, devices, tensors."""
