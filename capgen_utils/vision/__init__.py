"""Image encoders, CLIP and the feature cache."""
