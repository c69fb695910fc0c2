// Nothing: the driver says of it how many clusters of blocks run at once (see nvrtc.py).

extern "C" __global__ void nothing() {}
