"""`python benchmarks/rtc_modes.py`: guided against prefix real-time chunking, on a flow whose exact answer is known.

Chunks of 50 smooth actions come from two ways round an obstacle (a mixture of two Gaussian processes, so the velocity
of the flow, and the exact distribution of a chunk given its first rows, are known in closed form). One chunk is being
executed; the next is denoised in 10 steps while d of its actions pass. What the robot then executes is the old chunk's
first d rows and the new chunk's others. Reported for each way of continuing:

bound    largest difference between the first d rows of the new chunk and the old one: what the policy believes to be
         under way, and is not
jump     step at the seam, from row d - 1 of the old chunk to row d of the new one, in mean steps inside a chunk
switch   share of chunks that go round the other side after the seam
strange  squared distance of the executed motion from the flow's own distribution for each value, given its side: 1 is
         a typical sample, large is a motion that the policy would never make
"""

import argparse

import torch

from grasp_cube.policies.pi_rtc import steer

ROWS, STEPS, SAMPLES = 50, 10, 400
# LeRobot's defaults.
MOST = 10.0


class TwoWays:
    """Chunks (rows,) round the left or the right: mean +-bump, covariance of an RBF kernel with a little noise."""

    def __init__(self) -> None:
        rows = torch.arange(ROWS, dtype=torch.float64)
        bump = torch.sin(torch.pi * rows / ROWS)
        self.means = torch.stack([bump, -bump])
        self.cov = (
            0.1 * torch.exp(-0.5 * ((rows[:, None] - rows) / 10) ** 2) + 1e-4 * torch.eye(ROWS).double()
        )

    def sample(self, count: int, generator: torch.Generator) -> torch.Tensor:
        side = torch.randint(2, (count,), generator=generator)
        noise = torch.randn(count, ROWS, generator=generator, dtype=torch.float64)
        return self.means[side] + noise @ torch.linalg.cholesky(self.cov).T

    def velocity(self, x: torch.Tensor, time: float) -> torch.Tensor:
        """E[noise - chunk | x], for x (count, rows) = time * noise + (1 - time) * chunk."""
        spread = (1 - time) ** 2 * self.cov + time**2 * torch.eye(ROWS).double()
        gain = (1 - time) * torch.linalg.solve(spread, self.cov).T
        off = x[:, None] - (1 - time) * self.means
        log = -0.5 * (off @ torch.linalg.inv(spread) * off).sum(-1)
        chunks = self.means + off @ gain.T
        expected = (torch.softmax(log, dim=1)[..., None] * chunks).sum(1)
        return (x - expected) / time

    def side(self, chunk: torch.Tensor) -> torch.Tensor:
        return self._distances(chunk).argmin(1)

    def strange(self, chunk: torch.Tensor) -> torch.Tensor:
        return self._distances(chunk).min(1).values / ROWS

    def _distances(self, chunk: torch.Tensor) -> torch.Tensor:
        off = chunk[:, None] - self.means
        return (off @ torch.linalg.inv(self.cov) * off).sum(-1)


def denoise(
    ways: TwoWays, prev: torch.Tensor, mode: str, delay: int, mask_end: int, generator: torch.Generator
) -> torch.Tensor:
    """New chunks (count, rows) that continue `prev`."""
    weights = torch.zeros(ROWS, dtype=torch.float64)
    weights[:delay] = 1
    weights[delay:mask_end] = torch.linspace(1, 0, mask_end - delay + 2, dtype=torch.float64)[1:-1]
    if mode == "hard rows only":
        weights[:] = 0
    bound = torch.arange(ROWS) < delay
    x = torch.randn(prev.shape, generator=generator, dtype=torch.float64)
    for step in range(STEPS):
        time = 1 - step / STEPS
        velocity = ways.velocity(x, time)
        if mode != "none":
            velocity = steer(velocity, x, time, prev, weights, MOST, None if mode == "guided" else bound)
        x = x - velocity / STEPS
    return x


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    ways = TwoWays()
    prev = ways.sample(SAMPLES, torch.Generator().manual_seed(0))
    inner = prev.diff(dim=1).abs().mean()
    print(f"{SAMPLES} chunks of {ROWS} rows, {STEPS} denoising steps; mean step inside a chunk {inner:.4f}")
    print(f"{'delay':>5} {'mask end':>8}  {'mode':<15} {'bound':>7} {'jump':>7} {'switch':>7} {'strange':>8}")
    for delay, mask_end in ((2, 25), (5, 25), (10, 25), (20, 30)):
        for mode in ("none", "guided", "hard rows only", "prefix"):
            new = denoise(ways, prev, mode, delay, mask_end, torch.Generator().manual_seed(1))
            executed = torch.cat([prev[:, :delay], new[:, delay:]], dim=1)
            bound = (new - prev)[:, :delay].abs().amax(1).mean()
            jump = (executed[:, delay] - executed[:, delay - 1]).abs().mean() / inner
            switch = (ways.side(new) != ways.side(prev)).double().mean()
            strange = ways.strange(executed).median()
            print(
                f"{delay:>5} {mask_end:>8}  {mode:<15} {bound:>7.3f} {jump:>7.2f} {switch:>7.2f} {strange:>8.2f}"
            )


if __name__ == "__main__":
    main()
