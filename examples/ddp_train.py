"""A training script as anybody would write it: DistributedDataParallel under torchrun. It does not know gradtap.

    torchrun --nproc-per-node 4 examples/ddp_train.py PICTURE_7.png PICTURE_42.png ...

A picture's class is the number at the end of its name. Where SAVE_BATCHES names a folder, each rank leaves there what
it trained on, so that somebody can compare it with what an eavesdropper found.
"""

import argparse
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

# Before there is a process group: imported later (DDP does), it would hold on to the group, and torch 2.13 now and then
# aborts at exit.
import torch.distributed.nn
from ddp_model import build
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler


class Pictures(Dataset[tuple[Tensor, int]]):
    """Color pictures of 32x32 pixels, from 0 to 1, and their classes."""

    def __init__(self, files: list[Path]) -> None:
        self.files = sorted(files)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        file = self.files[index]
        pixels = np.array(Image.open(file).convert("RGB").resize((32, 32)))
        return torch.from_numpy(pixels).permute(2, 0, 1) / 255, int(file.stem.rsplit("_", 1)[1])


def main() -> None:
    """Trains each rank on its share of the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="+", type=Path)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--lr", type=float, default=0.1)
    options = parser.parse_args()

    dist.init_process_group("gloo")
    rank, saved = dist.get_rank(), os.environ.get("SAVE_BATCHES")
    torch.manual_seed(0)
    data = Pictures(options.pictures)
    sampler: DistributedSampler[tuple[Tensor, int]] = DistributedSampler(data)
    loader = DataLoader(data, batch_size=options.batch_size, sampler=sampler)
    model = DistributedDataParallel(build())
    optimizer = torch.optim.SGD(model.parameters(), lr=options.lr)
    step = 0
    for epoch in range(options.epochs):
        sampler.set_epoch(epoch)
        for inputs, labels in loader:
            loss = nn.functional.cross_entropy(model(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if saved:
                Path(saved).mkdir(parents=True, exist_ok=True)
                np.savez(Path(saved, f"step{step}.rank{rank}.npz"), inputs=inputs.numpy(), labels=labels.numpy())
            if rank == 0:
                print(f"epoch {epoch} step {step}: loss {loss.item():.4f}")
            step += 1
    del model, loss  # DDP holds the group too
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
