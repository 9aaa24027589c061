"""Speaker embeddings: filter-bank features, statistics pooling, a margin with sub-centers for noisy labels."""

import argparse

import torch
from torch import Tensor, nn

import fused_arcface as fa

SPEAKERS, BANDS, DIM = 200, 40, 96


class SpeakerNet(nn.Module):
    """Convolutions over time, mean and deviation over the frames, a linear map (an x-vector in small)."""

    def __init__(self) -> None:
        super().__init__()
        self.frames = nn.Sequential(
            nn.Conv1d(BANDS, 128, 5, padding=2), nn.ReLU(), nn.Conv1d(128, 128, 3, dilation=2, padding=2), nn.ReLU()
        )
        self.embedding = nn.Linear(256, DIM)

    def forward(self, features: Tensor) -> Tensor:
        """Return embeddings (N, DIM) of features (N, BANDS, frames)."""
        frames = self.frames(features)
        return self.embedding(torch.cat([frames.mean(2), frames.std(2)], 1))


def main(steps: int) -> None:
    """Train with a margin that grows, and compare two utterances."""
    torch.manual_seed(0)
    voices = torch.randn(SPEAKERS, BANDS, 1)
    net = SpeakerNet()
    head = fa.MarginHead(DIM, SPEAKERS, margin=fa.CosFace(0.0), scale=32.0, sub_centers=3)
    optimizer = torch.optim.SGD([*net.parameters(), *head.parameters()], lr=0.02, momentum=0.9)
    for step in range(steps):
        head.margin = fa.CosFace(0.2 * min(1.0, step / (0.5 * steps)))  # as speaker toolkits do
        labels = torch.randint(SPEAKERS, (32,))
        loss = head(net(voices[labels] + torch.randn(32, BANDS, 100)), labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimizer.step()
    net.eval()
    with torch.no_grad():
        same = net(voices[[0, 0, 1]] + torch.randn(3, BANDS, 100))
    cosine = nn.functional.cosine_similarity(same[:1], same[1:])
    print(f"loss {loss.item():.3f}; cosines: same speaker {cosine[0]:.2f}, other speaker {cosine[1]:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    main(parser.parse_args().steps)
