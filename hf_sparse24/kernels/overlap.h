// Programmatic dependent launch: a kernel begins while the one before it in the stream ends (sm_90 and newer). `launch` in
// nvrtc.py asks for it. What the other kernel has written is there only after the wait, and until then its operands must
// not be touched; where the kernel was launched without overlap, the wait is over at once.

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define OVERLAPS 1
__device__ void let_the_next_kernel_begin() { asm volatile("griddepcontrol.launch_dependents;"); }
__device__ void wait_for_the_kernel_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ void prefetch(const void *from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }
#else
#ifndef EMULATED
#define OVERLAPS 0
#endif
__device__ void let_the_next_kernel_begin() {}
__device__ void wait_for_the_kernel_before() {}
__device__ void prefetch(const void *) {}
#endif
