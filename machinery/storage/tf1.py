"""TensorFlow 1's API, `tf`, loaded quietly: the only module that does something when it is imported."""

import os

from machinery.errors import silent_stderr

with silent_stderr():
    # TensorFlow reads both once, when it loads. By itself it uses oneDNN only on CPUs with AVX-512; on
    # CPUs with AVX2, oneDNN makes a step a third shorter.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow.compat.v1 as tf

    tf.logging.set_verbosity(tf.logging.ERROR)  # compat.v1 is used on purpose: this hides its warnings
