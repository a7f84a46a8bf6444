"""Ray's nodes, the tasks and actors on them, and who replaces lost ones: no S3 and no TensorFlow."""
