"""What a run reads and writes: S3, folders, tars, images, checkpoints, the terminal. No Ray is here."""
