"""Ray's nodes: which cluster a run is on, tasks and actors there, and what replaces the lost.

Nothing here reads S3 or knows of TensorFlow.
"""
