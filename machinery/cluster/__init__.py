"""Ray's nodes, tasks and actors there, and what replaces the lost. No S3 and no TensorFlow is here."""
