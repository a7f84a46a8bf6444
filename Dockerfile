# What rayjob.yaml runs: the driver's files and what they need, in Ray's image.
FROM rayproject/ray:2.60.0-py311-cpu
WORKDIR /home/ray/imagenet
COPY requirements.txt constraints.txt ./
RUN pip install --no-cache-dir --requirement requirements.txt --constraint constraints.txt
COPY *.py ./
COPY machinery machinery
