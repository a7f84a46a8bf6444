"""What a run reads and writes: S3, folders, tars, images, checkpoints, the terminal.

Nothing here knows of Ray.
"""
