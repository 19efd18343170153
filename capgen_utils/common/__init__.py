"""Helpers without any captioning: files, paths, devices, tensors, models from the hub."""
