"""What a rank may do to its gradient before it leaves: one idea a file, composed in order. See `base` and `chain`.

| name             | what is sent                                         | file      | remembers          |
| ---------------- | ---------------------------------------------------- | --------- | ------------------ |
| `soteria`        | without what a layer's most telling inputs give      | `soteria` |                    |
| `clip`           | at most so long                                      | `clip`    |                    |
| `clip-examples`  | the mean of examples' gradients, each at most so long | `clip`    |                    |
| `dp-sgd`         | the same with noise: differential privacy            | `dp_sgd`  |                    |
| `noise-gaussian`, `noise-laplace` | with noise added                    | `noise`   |                    |
| `prune`          | the largest elements; the others are forgotten       | `prune`   |                    |
| `topk`, `topk-dgc` | the largest elements; the others are kept for later | `topk`    | residual, velocity |
| `fp16`, `bf16`   | floats of two bytes                                  | `half`    |                    |
| `int8`           | a byte an element, a unit a tensor                   | `int8`    |                    |
| `qsgd`           | whole levels of each bucket's norm                   | `qsgd`    |                    |
| `ternary`        | -1, 0 or 1                                           | `ternary` |                    |
| `sign`           | a bit an element                                     | `sign`    | residual           |
| `powersgd`       | two thin matrices in place of a large one            | `powersgd` | residual, factor  |
| `powersgd-averaged` | the same, averaged over the ranks in two rounds   | `powersgd_averaged` | residual, factor |
| `secure-aggregation` | masked words, of which only the sum says anything | `secure`  |                    |
"""

from harness.defenses.base import Moment, Sizes, State
from harness.defenses.chain import DEFENSES, Chain, load_defense

__all__ = ["DEFENSES", "Chain", "Moment", "Sizes", "State", "load_defense"]
