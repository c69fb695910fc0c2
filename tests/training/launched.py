"""What `accelerate launch` runs in test_distributed: a script of examples/, with FSDP2 on CPUs.

accelerate takes no FSDP where processes have CPUs, by the name that it gives to a group of them; here it is told that
they have GPUs, and everything else is as it is: `fully_shard` and gloo.
"""

import runpy
import sys

import torch.distributed as dist
from accelerate.state import AcceleratorState, DistributedType, PartialState


def main():
    initialize = PartialState.__init__

    def renamed(self, *args, **kwargs):
        initialize(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = renamed
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
    print(AcceleratorState().distributed_type)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
