"""Make the records under data/records that are too heavy for every run of the notebooks.

Usage: python notebooks/evaluate.py [--in-place] [name ...], with the names
    classifier        train the network that measures samples (data/weights/classifier.pt)
    floor             the Frechet distance of real images, ten sets of 500 and of 1000
    schedulers        question 4(d): one flow along every schedule, and every flow along its own
    guidance          notebook 04: samples with labels, quality against diversity
    quality           10 000 samples of flow_linear: precision, recall, shares of the classes
    plain_recipe      the same for the plain recipe of public course labs, trained for it
    sigma             question 5(b): the SDE (3) for every sigma_t at 50 and 250 steps
    sigma_contained   the same with the score that the velocity contains, without a second network
    budgets           notebook 05: score SDE and flow ODE in the plane, at equal budgets
Without a name, all but classifier and plain_recipe, which train. A record holds N, function
evaluations, seeds, device, versions and the SHA-256 of the weights; the notebooks refuse a
record of other weights. Written to build/records, or with --in-place, for maintainers, to data/.
"""

import functools
import itertools
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import baseline

import helpers
from helpers import UNet

SEED = 7
BATCH = 250
FLOWS = [f"flow_{name}" for name in helpers.SCHEDULERS]  # the linear one first


class Judge:
    """Measures samples against the 10 000 test images, with FashionClassifier's features."""

    def __init__(self, device):
        self.device = device
        self.classifier = helpers.FashionClassifier().to(device)
        test, self.labels = helpers.load_fashion_mnist("test")
        self.test = helpers.to_model_range(test)
        self.test_features = self.features(self.test)

    @torch.no_grad()
    def features(self, x):
        """Features (N, 64) of images, clipped to [-1, 1] as they are for display."""
        chunks = [self.classifier.features(c.to(self.device)) for c in x.clamp(-1, 1).split(500)]
        return torch.cat(chunks).cpu()

    @torch.no_grad()
    def classes(self, features):
        """The most likely class for each row of features, (N,)."""
        return self.classifier.logits(features.to(self.device)).argmax(dim=1).cpu()

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

    def coverage(self, x):
        """Precision and recall against test images, and the classes that the classifier reads."""
        features = self.features(x)
        precision, recall = helpers.precision_recall(self.test_features, features)
        shares = self.classes(features).bincount(minlength=10) / len(x)
        real = self.classes(self.test_features).bincount(minlength=10) / len(self.test)
        return {
            "precision": precision,
            "recall": recall,
            "class_shares": shares.tolist(),
            "total_variation": (shares - real).abs().sum().item() / 2,
        }


def sample(solve, n, device, precision):
    """Solve from n draws of the noise in batches; solve(x0, generator) -> x; returns (n, ...)."""
    generator = helpers.make_generator(SEED)
    noise = torch.randn(n, 1, 28, 28, generator=generator)
    dtype = getattr(torch, precision)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        chunks = [solve(x0.to(device), generator).cpu() for x0 in noise.split(BATCH)]
    return torch.cat(chunks)


def save(name, networks, rows, device, **settings):
    """Write a record: its settings, the machine, and one row for each case."""
    content = {**settings, "seed": SEED, **helpers.describe_machine(device), "rows": rows}
    helpers.save_record(name, networks, content)


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

    helpers.train_or_load(
        "classifier",
        lambda: helpers.FashionClassifier(pretrained=False),
        loss,
        sample_batch,
        config=config,
        device=device,
        retrain=True,
    )
    judge = Judge(device)
    accuracy = (judge.classes(judge.test_features) == judge.labels).double().mean().item()
    helpers.save_record("classifier", ["classifier"], {"test_accuracy": accuracy})
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
    save("floor", ["classifier"], rows, device, draws=draws)


def evaluate_schedulers(judge, device, n=1000):
    """Question 4(d): flows from the same noise by Heun's method.

    flow_linear along every schedule, and the flow of every schedule along its own.
    """
    flows = {name: helpers.load_weights(UNet(), name).to(device) for name in FLOWS}
    linear = flows["flow_linear"]
    cases = [
        ("flow_linear", name, helpers.reschedule(linear, scheduler))
        for name, scheduler in helpers.SCHEDULERS.items()
    ]
    cases += [(name, name.removeprefix("flow_"), flows[name]) for name in FLOWS[1:]]
    precision = helpers.choose_dtype(linear, device)
    rows = []
    for network, schedule, velocity in cases:
        for steps in (4, 8, 16, 32):

            def solve(x0, generator, velocity=velocity, steps=steps):
                return helpers.heun(velocity, x0, helpers.time_grid(steps))

            x = sample(solve, n, device, precision)
            case = {"network": network, "scheduler": schedule, "evaluations": 2 * steps}
            rows.append({**case, **judge.measure(x)})
            print(rows[-1], flush=True)
    save("schedulers", [*FLOWS, "classifier"], rows, device, n=n, precision=precision)


def sample_finely(velocity, n, device, precision):
    """n samples with 64 evaluations of Heun's method, with shorter steps near t = 1."""
    ts = 1 - (1 - helpers.time_grid(32)) ** 1.5
    return sample(lambda x0, generator: helpers.heun(velocity, x0, ts), n, device, precision)


def evaluate_quality(judge, device, n=10_000):
    """flow_linear at N = 10 000 with 64 evaluations, and training images in its place."""
    velocity = helpers.load_weights(UNet(), "flow_linear").to(device)
    precision = helpers.choose_dtype(velocity, device)
    train, _ = helpers.load_fashion_mnist("train")
    index = torch.randperm(len(train), generator=helpers.make_generator(SEED))[:n]
    real = helpers.to_model_range(train[index])
    rows = []
    for name, x in (
        ("training images", real),
        ("flow_linear", sample_finely(velocity, n, device, precision)),
    ):
        rows.append({"samples": name, **judge.measure(x), **judge.coverage(x)})
        print(rows[-1], flush=True)
    networks = ["flow_linear", "classifier"]
    save("quality", networks, rows, device, n=n, evaluations=64, precision=precision)


def evaluate_plain_recipe(judge, device, n=10_000):
    """The same for the plain recipe of public course labs; its weights are not kept."""
    config = {"steps": 5000, "batch": 250, "lr": 1e-3, "seed": 0}
    start = time.perf_counter()
    model, losses = baseline.train(device, **config)
    config |= {"seconds": time.perf_counter() - start, "last_loss": losses[-500:].mean().item()}
    config |= {"parameters": sum(p.numel() for p in model.parameters())}
    precision = helpers.choose_dtype(model, device)
    x = sample_finely(model, n, device, precision)
    row = {"samples": "plain recipe", **judge.measure(x), **judge.coverage(x)}
    settings = {"training": config, "n": n, "evaluations": 64, "precision": precision}
    save("plain_recipe", ["classifier"], [row], device, **settings)


def evaluate_guidance(judge, device, n=1000):
    """flow_labels with classifier-free guidance: labels in equal number, Heun's method."""
    model = helpers.load_weights(UNet(num_classes=10), "flow_labels").to(device)
    precision = helpers.choose_dtype(model, device)
    labels, ts = torch.arange(BATCH, device=device) % 10, helpers.time_grid(16)
    asked = labels.cpu().repeat(n // BATCH)
    of_test = mean_spread(judge.test_features, judge.labels)
    rows = []
    for guidance in (1, 1.5, 2, 4):
        velocity = helpers.guided_velocity(model, labels, guidance)

        def solve(x0, generator, velocity=velocity):
            return helpers.heun(velocity, x0, ts)

        x = sample(solve, n, device, precision)
        features = judge.features(x)
        accuracy = (judge.classes(features) == asked).double().mean().item()
        spread = mean_spread(features, asked) / of_test
        row = {"guidance": guidance, "accuracy": accuracy, "spread": spread, **judge.measure(x)}
        rows.append(row)
        print(row, flush=True)
    save("guidance", ["flow_labels", "classifier"], rows, device, n=n, precision=precision)


def mean_spread(features, labels):
    """Root mean squared distance of features to the mean of their class, mean over classes."""
    groups = [features[labels == label] for label in labels.unique()]
    return statistics.mean(g.var(dim=0).sum().sqrt().item() for g in groups)


def sample_every_sigma(make_drift, judge, device, precision, n):
    """Rows for every sigma_t at 50 and 250 steps; make_drift(sigma) is the drift of eq. (3)."""
    rows = []
    for steps in (50, 250):
        ts = helpers.time_grid(steps)
        for label, sigma in helpers.SIGMAS.items():
            drift = make_drift(sigma)

            def solve(x0, generator, drift=drift, sigma=sigma, ts=ts):
                return helpers.euler_maruyama(drift, sigma, x0, ts, generator=generator)

            x = sample(solve, n, device, precision)
            if label == "0 (ODE)":
                ode = x
            away = (x.clamp(-1, 1) - ode.clamp(-1, 1)).square().mean().sqrt().item()
            rows.append({"sigma": label, "steps": steps, **judge.measure(x), "rms_to_ode": away})
            print(rows[-1], flush=True)
    return rows


def evaluate_sigma(judge, device, n=500):
    """Question 5(b): Euler-Maruyama on eq. (3), with the trained velocity and score."""
    path = helpers.GaussianPath(helpers.LinearScheduler())
    velocity = helpers.load_weights(UNet(), "flow_linear").to(device)
    net = helpers.load_weights(UNet(), "score_linear").to(device)
    precision = helpers.choose_dtype(velocity, device)
    make_drift = functools.partial(helpers.sde_drift, velocity, helpers.NoiseScore(net, path))
    rows = sample_every_sigma(make_drift, judge, device, precision, n)
    networks = ["flow_linear", "score_linear", "classifier"]
    save("sigma", networks, rows, device, n=n, precision=precision)


def evaluate_sigma_contained(judge, device, n=500):
    """Question 5(b) with one network: the score that the velocity contains."""
    path = helpers.GaussianPath(helpers.LinearScheduler())
    velocity = helpers.load_weights(UNet(), "flow_linear").to(device)
    precision = helpers.choose_dtype(velocity, device)
    make_drift = functools.partial(helpers.sde_drift_from_velocity, velocity, path)
    rows = sample_every_sigma(make_drift, judge, device, precision, n)
    save("sigma_contained", ["flow_linear", "classifier"], rows, device, n=n, precision=precision)


def train_dog(loss, dogs, *, hidden, steps, batch, lr, seed):
    """Train an MLP of three hidden layers on points of the dog; returns it in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = helpers.MLP(hidden=hidden, layers=3).to(dogs.device)

    def sample_batch(generator):
        index = torch.randint(len(dogs), (batch,), generator=generator, device=dogs.device)
        return dogs[index]

    helpers.train(net, loss, sample_batch, steps=steps, lr=lr, seed=seed)
    return net


def dog_samplers(path, net, evaluations):
    """(drift, diffusion, times) of an SDE and an ODE with as many evaluations of the network.

    net predicts the velocity if the path is linear, else the noise of the variance-preserving
    path, whose SDE has the rate 2/t, singular at t = 0: it starts at t = 0.01.
    """
    if isinstance(path.scheduler, helpers.LinearScheduler):
        ts, sigma = helpers.time_grid(evaluations), helpers.SIGMAS["sqrt(2 beta)"]
        drift = helpers.sde_drift_from_velocity(net, path, sigma)
        return {"SDE": (drift, sigma, ts), "ODE": (net, 0, ts)}
    ts = 1 - (1 - helpers.time_grid(evaluations, start=0.005)) ** 2
    score = helpers.NoiseScore(net, path)

    def drift(x, t, factor=2):
        return (x + factor * score(x, t)) / helpers.expand_like(t, x)

    def velocity(x, t):
        return drift(x, t, factor=1)

    return {"SDE": (drift, lambda t: torch.sqrt(2 / t), ts), "ODE": (velocity, 0, ts)}


def evaluate_budgets(device, n=2000, evaluations=200, batch=256, lr=4e-3, points=20_000):
    """Beyond the assignment: score SDE and flow ODE from noise to the dog at equal budgets."""
    generator = helpers.make_generator(SEED)
    dogs = helpers.silhouette("dog", points, generator=generator).to(device)
    real = helpers.silhouette("dog", 9 * n, generator=generator).split(n)
    noise = torch.randn(n, 2, generator=generator).to(device)
    preserving = helpers.FunctionScheduler(lambda t: t, lambda t: torch.sqrt(1 - t**2))
    flow_path = helpers.GaussianPath(helpers.LinearScheduler())
    score_path = helpers.GaussianPath(preserving)

    def flow_loss(net, z, *, generator):
        return helpers.flow_matching_loss(net, z, flow_path, generator=generator)

    def score_loss(net, z, *, generator):
        score = helpers.NoiseScore(net, score_path)
        return helpers.score_matching_loss(score, z, score_path, generator=generator)

    def distance(x):
        directions = helpers.make_generator(SEED)
        return helpers.sliced_wasserstein(real[0], x.cpu(), generator=directions)

    rows = []
    kinds = {"flow": (flow_path, flow_loss), "score": (score_path, score_loss)}
    budgets = itertools.product((32, 128), (250, 1000, 4000), range(3), kinds)
    for hidden, steps, seed, kind in budgets:
        path, loss = kinds[kind]
        case = {"hidden": hidden, "steps": steps, "seed": seed}
        net = train_dog(loss, dogs, batch=batch, lr=lr, **case)
        for sampler, (drift, sigma, ts) in dog_samplers(path, net, evaluations).items():
            x = helpers.euler_maruyama(drift, sigma, noise, ts, generator=generator)
            measures = {
                "sliced_wasserstein": distance(x),
                "mmd2": helpers.mmd2(real[0], x.cpu(), 0.3),
            }
            rows.append({"network": kind, "sampler": sampler, **case, **measures})
        print(rows[-2], rows[-1]["sliced_wasserstein"], flush=True)
    floor = [distance(x) for x in real[1:]]
    settings = {"n": n, "evaluations": evaluations, "batch": batch, "lr": lr, "points": points}
    save("budgets", [], rows, device, **settings, bandwidth=0.3, floor=floor)


JOBS = {
    "floor": evaluate_floor,
    "schedulers": evaluate_schedulers,
    "guidance": evaluate_guidance,
    "quality": evaluate_quality,
    "plain_recipe": evaluate_plain_recipe,
    "sigma": evaluate_sigma,
    "sigma_contained": evaluate_sigma_contained,
    "budgets": lambda judge, device: evaluate_budgets(device),
}


def main(names):
    if "--in-place" in names:
        names.remove("--in-place")
        os.environ["FLOW_OUTPUT"] = str(helpers.ROOT)
    names = names or [name for name in JOBS if name != "plain_recipe"]
    unknown = set(names) - {"classifier", *JOBS}
    if unknown:
        sys.exit(
            f"unknown: {', '.join(sorted(unknown))}; choose from classifier, {', '.join(JOBS)}"
        )
    device = helpers.pick_device()
    if "classifier" in names:
        train_classifier(device)
    chosen = [job for name, job in JOBS.items() if name in names]
    judge = Judge(device) if chosen else None
    for job in chosen:
        job(judge, device)


if __name__ == "__main__":
    main(sys.argv[1:])
