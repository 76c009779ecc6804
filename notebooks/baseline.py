"""The mark to beat: the plain recipe of public course labs, for question 4(b)'s task and budget.

The ordinary choices: BatchNorm, skip connections added below full resolution, bilinear
upsampling, the time added to the features, no average of the weights, a constant rate.
`python notebooks/evaluate.py plain_recipe` trains it once and measures its samples; the record is
kept, the weights are not.
"""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import helpers


class PlainResidualLayer(nn.Module):
    def __init__(self, channels, embedding):
        super().__init__()
        self.block1 = nn.Sequential(
            nn.SiLU(), nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 3, padding=1)
        )
        self.block2 = nn.Sequential(
            nn.SiLU(), nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 3, padding=1)
        )
        self.time = nn.Sequential(
            nn.Linear(embedding, embedding), nn.SiLU(), nn.Linear(embedding, channels)
        )

    def forward(self, x, embedding):
        h = self.block1(x) + self.time(embedding)[:, :, None, None]
        return x + self.block2(h)


class PlainUNet(nn.Module):
    """model(x, t) with the widths and numbers of layers of helpers.UNet."""

    def __init__(self, channels=(32, 64, 128), embedding=40):
        super().__init__()
        c1, c2, c3 = channels

        def layers(count, width):
            return nn.ModuleList([PlainResidualLayer(width, embedding) for _ in range(count)])

        def up(wide, narrow):
            return nn.Sequential(
                nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(wide, narrow, 3, padding=1)
            )

        self.frequencies = nn.Parameter(torch.randn(embedding // 2))
        self.stem = nn.Sequential(nn.Conv2d(1, c1, 3, padding=1), nn.BatchNorm2d(c1), nn.SiLU())
        self.encoder1, self.down1 = layers(2, c1), nn.Conv2d(c1, c2, 3, stride=2, padding=1)
        self.encoder2, self.down2 = layers(2, c2), nn.Conv2d(c2, c3, 3, stride=2, padding=1)
        self.bottleneck = layers(3, c3)
        self.up2, self.decoder2 = up(c3, c2), layers(2, c2)
        self.up1, self.decoder1 = up(c2, c1), layers(2, c1)
        self.head = nn.Conv2d(c1, 1, 3, padding=1)

    def forward(self, x, t):
        angles = 2 * torch.pi * t[:, None] * self.frequencies
        embedding = 2**0.5 * torch.cat([angles.sin(), angles.cos()], dim=1)

        def run(layers, h):
            for layer in layers:
                h = layer(h, embedding)
            return h

        skip1 = self.down1(run(self.encoder1, self.stem(x)))
        skip2 = self.down2(run(self.encoder2, skip1))
        h = run(self.bottleneck, skip2)
        h = run(self.decoder2, self.up2(h + skip2))
        h = run(self.decoder1, self.up1(h + skip1))
        return self.head(h).to(x.dtype)


def train(device, *, steps, batch, lr, seed):
    """A PlainUNet trained by Adam at a constant rate on the flow matching loss; and its losses.

    Returns the network in eval mode and the loss of every step, (steps,). bfloat16 where the
    hardware has units for it.
    """
    images, _ = helpers.load_fashion_mnist("train")
    sample_batch = helpers.image_batches(images.to(device), batch)
    path = helpers.GaussianPath(helpers.LinearScheduler())
    generator = torch.Generator(device).manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = PlainUNet().to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    dtype = getattr(torch, helpers.choose_dtype(model, device))
    losses = torch.zeros(steps)
    for step in range(steps):
        z = sample_batch(generator)
        with torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16):
            loss = helpers.flow_matching_loss(model, z, path, generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses[step] = loss.detach()
        if (step + 1) % 250 == 0:
            print(f"step {step + 1}: loss {losses[step - 249 : step + 1].mean():.4f}", flush=True)
    return model.eval(), losses
