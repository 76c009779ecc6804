"""Make the records under data/records that are too heavy for every run of the notebooks.

Usage: python notebooks/evaluate.py [classifier] [floor] [schedulers] [sigma]
    classifier   train the network that measures samples (data/weights/classifier.pt)
    floor        the Frechet distance of real images, ten sets of 500 and of 1000
    schedulers   question 4(d): the flow sampled along every schedule by Heun's method
    sigma        question 5(b): the SDE (3) for every sigma_t at 50 and 250 steps
Without a name, all but the classifier. A record holds N, function evaluations, seeds, device,
versions and the SHA-256 of the weights; the notebooks refuse a record of other weights.
"""

import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import helpers
from helpers import UNet

SEED = 7
BATCH = 250


class Judge:
    """Measures samples against the 10 000 test images, with FashionClassifier's features."""

    def __init__(self, device):
        self.device = device
        self.classifier = helpers.FashionClassifier().to(device)
        test, _ = helpers.load_fashion_mnist("test")
        self.test = helpers.to_model_range(test)
        self.test_features = self.features(self.test)

    @torch.no_grad()
    def features(self, x):
        """Features (N, 64) of images, clipped to [-1, 1] as they are for display."""
        chunks = [self.classifier.features(c.to(self.device)) for c in x.clamp(-1, 1).split(500)]
        return torch.cat(chunks).cpu()

    def measure(self, x):
        """Frechet and sliced Wasserstein distances to test images, and residual noise."""
        generator = helpers.make_generator(SEED)
        real = self.test[torch.randperm(len(self.test), generator=generator)[: len(x)]]
        sliced = helpers.sliced_wasserstein(
            x.clamp(-1, 1).flatten(1), real.flatten(1), generator=generator
        )
        return {
            "frechet": helpers.frechet_distance(self.features(x), self.test_features),
            "sliced_wasserstein": sliced,
            "residual_noise": helpers.residual_noise(x),
        }


def sample(solve, n, device, precision):
    """Solve from n draws of the noise in batches; solve(x0, generator) -> x; returns (n, ...)."""
    generator = helpers.make_generator(SEED)
    noise = torch.randn(n, 1, 28, 28, generator=generator)
    dtype = getattr(torch, precision)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        chunks = [solve(x0.to(device), generator).cpu() for x0 in noise.split(BATCH)]
    return torch.cat(chunks)


def train_classifier(device):
    """Train FashionClassifier by cross-entropy; record its accuracy on the test images."""
    images, labels = (x.to(device) for x in helpers.load_fashion_mnist("train"))
    config = {"network": "FashionClassifier", "steps": 4000, "batch": 250, "lr": 2e-3}
    config |= {"ema": 0.999, "seed": 0, "augmentation": "mirrored, shifted by up to 2 pixels"}
    padded, side = F.pad(images, (2, 2, 2, 2)), torch.arange(28, device=device)

    def sample_batch(generator):
        def draw(high):
            return torch.randint(high, (250,), generator=generator, device=device)

        index, rows, columns = draw(len(images)), draw(5)[:, None] + side, draw(5)[:, None] + side
        columns = torch.where(draw(2)[:, None] == 0, columns, columns.flip(1))
        crops = padded[index[:, None, None], 0, rows[:, :, None], columns[:, None, :]]
        return helpers.to_model_range(crops[:, None]), labels[index]

    def loss(model, batch, *, generator):
        return F.cross_entropy(model(batch[0]), batch[1])

    model, _ = helpers.train_or_load(
        "classifier",
        lambda: helpers.FashionClassifier(pretrained=False),
        loss,
        sample_batch,
        config=config,
        device=device,
        retrain=True,
    )
    test, truth = helpers.load_fashion_mnist("test")
    with torch.no_grad():
        guesses = [model(helpers.to_model_range(c.to(device))).argmax(1) for c in test.split(500)]
    accuracy = (torch.cat(guesses).cpu() == truth).double().mean().item()
    helpers.save_evaluation("classifier", ["classifier"], {"test_accuracy": accuracy})
    print(f"classifier: test accuracy {accuracy:.4f}")


def evaluate_floor(judge, device, draws=10):
    """What perfect samples would score: the Frechet distance of n training images."""
    train, _ = helpers.load_fashion_mnist("train")
    generator, rows = helpers.make_generator(SEED), []
    for n in (500, 1000):
        index = torch.randperm(len(train), generator=generator)[: draws * n]
        sets = judge.features(helpers.to_model_range(train[index])).split(n)
        values = [helpers.frechet_distance(x, judge.test_features) for x in sets]
        rows.append({"n": n, "mean": statistics.mean(values), "std": statistics.stdev(values)})
        print(rows[-1], flush=True)
    content = {"draws": draws, "seed": SEED, **helpers.describe_machine(device), "rows": rows}
    helpers.save_evaluation("floor", ["classifier"], content)


def evaluate_schedulers(judge, device, n=1000):
    """Question 4(d): flow_linear along every schedule, from the same noise, by Heun's method."""
    linear = helpers.load_weights(UNet(), "flow_linear").to(device)
    precision = helpers.choose_precision(linear, device)
    rows = []
    for name, scheduler in helpers.SCHEDULERS.items():
        velocity = helpers.reschedule(linear, scheduler)
        for steps in (4, 8, 16, 32):

            def solve(x0, generator, velocity=velocity, steps=steps):
                return helpers.heun(velocity, x0, helpers.time_grid(steps))

            x = sample(solve, n, device, precision)
            rows.append({"scheduler": name, "evaluations": 2 * steps, **judge.measure(x)})
            print(rows[-1], flush=True)
    content = {"n": n, "seed": SEED, "precision": precision}
    content |= {**helpers.describe_machine(device), "rows": rows}
    helpers.save_evaluation("schedulers", ["flow_linear", "classifier"], content)


def evaluate_sigma(judge, device, n=500):
    """Question 5(b): Euler-Maruyama on eq. (3), with the score that the velocity contains."""
    path = helpers.GaussianPath(helpers.LinearScheduler())
    velocity = helpers.load_weights(UNet(), "flow_linear").to(device)
    precision = helpers.choose_precision(velocity, device)
    rows = []
    for steps in (50, 250):
        ts = helpers.time_grid(steps)
        for label, sigma in helpers.SIGMAS.items():
            drift = helpers.sde_drift_from_velocity(velocity, path, sigma)

            def solve(x0, generator, drift=drift, sigma=sigma, ts=ts):
                return helpers.euler_maruyama(drift, sigma, x0, ts, generator=generator)

            x = sample(solve, n, device, precision)
            if label == "0 (ODE)":
                ode = x
            away = (x.clamp(-1, 1) - ode.clamp(-1, 1)).square().mean().sqrt().item()
            rows.append({"sigma": label, "steps": steps, **judge.measure(x), "rms_to_ode": away})
            print(rows[-1], flush=True)
    content = {"n": n, "seed": SEED, "precision": precision}
    content |= {**helpers.describe_machine(device), "rows": rows}
    helpers.save_evaluation("sigma", ["flow_linear", "classifier"], content)


def main(names):
    jobs = {"floor": evaluate_floor, "schedulers": evaluate_schedulers, "sigma": evaluate_sigma}
    names = names or list(jobs)
    unknown = set(names) - {"classifier", *jobs}
    if unknown:
        sys.exit(
            f"unknown: {', '.join(sorted(unknown))}; choose from classifier, {', '.join(jobs)}"
        )
    device = helpers.pick_device()
    if "classifier" in names:
        train_classifier(device)
    chosen = [job for name, job in jobs.items() if name in names]
    judge = Judge(device) if chosen else None
    for job in chosen:
        job(judge, device)


if __name__ == "__main__":
    main(sys.argv[1:])
