"""What storing photos as JPEGs costs and saves, by quality.

    python benchmarks/quality.py FOLDER [--qualities 80 85 90 95]

FOLDER is laid out like the bucket: tars of photos below ILSVRC2012_img_train/. Each photo is decoded to
256x256, as driver.py does, encoded in each quality and decoded again. Times are CPU time of one core.
"""

import argparse
import time

from measuring import read_photos

from machinery.storage.images import decode_image

import numpy as np
import simplejpeg

SIZE = (256, 256)


def timed(function, values):
    """What a function makes of each value, and the milliseconds of CPU time that one takes."""
    start = time.process_time()
    made = [function(value) for value in values]
    return made, 1e3 * (time.process_time() - start) / len(values)


def main():
    """Measure and print a row for each quality."""
    parser = argparse.ArgumentParser(description="Measure JPEGs of 256x256 by their quality.")
    parser.add_argument("folder")
    parser.add_argument("--qualities", type=int, nargs="+", default=[80, 85, 88, 90, 92, 95])
    args = parser.parse_args()
    images = [decode_image(photo, SIZE) for photo in read_photos(args.folder)]
    print(f"{len(images)} photos: quality, kB, mean difference in grey levels, ms to encode, to decode")
    for quality in args.qualities:
        jpegs, encode = timed(lambda x, q=quality: simplejpeg.encode_jpeg(x, q, "RGB", "420"), images)
        pixels, decode = timed(lambda x: simplejpeg.decode_jpeg(x, "RGB"), jpegs)
        size = np.mean([len(jpeg) for jpeg in jpegs]) / 1e3
        pairs = zip(images, pixels, strict=True)
        difference = np.mean([np.abs(a.astype(int) - b).mean() for a, b in pairs])
        print(f"{quality:7} {size:6.1f} {difference:6.2f} {encode:6.2f} {decode:6.2f}", flush=True)


if __name__ == "__main__":
    main()
