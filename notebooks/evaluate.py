"""Make the records under data/records that are too heavy for every run of the notebooks.

Usage: python notebooks/evaluate.py [--in-place] [name ...], with the names
    classifier        train the network that measures samples (data/weights/classifier.pt)
    floor             the Frechet distance of real images, ten sets of 500, 1000 and 2000
    guidance          notebook 04: samples with labels, quality against diversity
    lessons           notebook 04: a classifier that learned from samples, on real images
    fit               question 4(b): the network and the exact minimiser of its loss, by time
    flows             questions 4(c), 4(d): the three flows on one path and grid, and copies
    places            question 4(d): error of the solver by the place of its steps and by the curve
    quality           10 000 samples of flow_linear: precision, recall, shares of the classes
    plain_recipe      the same for the plain recipe of public course labs, trained for it
    score_losses      question 5(a): what training with each score loss gives, in the plane
    sigma             question 5(b): the SDE (3) for every sigma_t, and remedies; it can go on
    dogs              notebook 05: score SDE and flow ODE in the plane, by times of training
Without a name, all but classifier and plain_recipe. A record holds its settings, seed, device,
versions and the SHA-256 of the weights (the classifier's its accuracy and that); the notebooks
refuse a record of other weights. Written to build/records, or with --in-place, for maintainers,
to data/.
"""

import functools
import itertools
import json
import math
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
SIGMAS = {  # the sigma_t compared in question 5(b): numbers, or functions of t with beta = 1 - t
    "0 (ODE)": 0,
    "0.25": 0.25,
    "0.5": 0.5,
    "1": 1.0,
    "2": 2.0,
    "2 beta": lambda t: 2 * (1 - t),
    "sqrt(2 beta)": lambda t: torch.sqrt(2 * (1 - t)),
}


def precision_recall(real, generated, k=3):
    """k-nearest-neighbour precision and recall of features (N, F), (M, F); two numbers.

    Precision: the share of generated points that lie within the distance of a real point to its
    k-th nearest real neighbour. Recall: the same with the roles exchanged (Kynkaanniemi et al.
    2019, eq. 1). Perfect samples do not reach 1: compare with the value of real ones.
    Raises ValueError unless 1 <= k < N and M.
    """
    real, generated = helpers._check_samples(real, generated)
    if not 1 <= k < min(len(real), len(generated)):
        raise ValueError(f"need 1 <= k < N and M, got {k}, {len(real)} and {len(generated)}")

    def covered(points, centres):
        radius = [torch.cdist(c, centres).kthvalue(k + 1).values for c in centres.split(1000)]
        radius = torch.cat(radius)  # the nearest, at distance 0, is the point itself
        inside = [(torch.cdist(p, centres) <= radius).any(dim=1) for p in points.split(1000)]
        return torch.cat(inside).double().mean().item()

    return covered(generated, real), covered(real, generated)


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
        precision, recall = precision_recall(self.test_features, features)
        shares = self.classes(features).bincount(minlength=10) / len(x)
        real = self.classes(self.test_features).bincount(minlength=10) / len(self.test)
        return {
            "precision": precision,
            "recall": recall,
            "class_shares": shares.tolist(),
            "total_variation": (shares - real).abs().sum().item() / 2,
        }


def sample(solve, n, device, dtype, seed=SEED):
    """Solve from n draws of the noise in batches; solve(x0, generator) -> x; returns (n, ...)."""
    generator = helpers.make_generator(seed)
    noise = torch.randn(n, 1, 28, 28, generator=generator)
    dtype = getattr(torch, dtype)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        chunks = [solve(x0.to(device), generator).cpu() for x0 in noise.split(BATCH)]
    return torch.cat(chunks)


def new_record(name):
    """The file of a record that is made here."""
    return helpers.output_folder("records") / f"{name}.json"


def of_weights(networks, content):
    """Content (a dict) after the SHA-256 of the networks it was made with."""
    return {"weights": {name: helpers.fingerprint(name) for name in networks}, **content}


def described(device, settings):
    return {**settings, "seed": SEED, **helpers.describe_machine(device)}


def save(name, networks, rows, device, **settings):
    """Write a record: its settings, the machine, and one row for each case."""
    save_record(name, networks, {**described(device, settings), "rows": rows})


def save_record(name, networks, content):
    """Write <name>.json: content (a dict), and the SHA-256 of the networks it was made with."""
    path = new_record(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(of_weights(networks, content), indent=1) + "\n"
    helpers.write_atomically(path, text.encode())


def kept_rows(name, networks, device, **settings):
    """The rows so far of a record in the making, if it is of these networks and settings."""
    path = new_record(name)
    kept = json.loads(path.read_text()) if path.exists() else {"rows": []}
    rows = kept.pop("rows")
    return rows if kept == of_weights(networks, described(device, settings)) else []


def augmented_batches(images, labels):
    """A sampler of 250 of these bytes, mirrored or not and shifted by up to 2 pixels."""
    padded, device = F.pad(images, (2, 2, 2, 2)), images.device
    side = torch.arange(28, device=device)

    def sample_batch(generator):
        def draw(high):
            return torch.randint(high, (BATCH,), generator=generator, device=device)

        index, rows, columns = draw(len(images)), draw(5)[:, None] + side, draw(5)[:, None] + side
        columns = torch.where(draw(2)[:, None] == 0, columns, columns.flip(1))
        crops = padded[index[:, None, None], 0, rows[:, :, None], columns[:, None, :]]
        return helpers.to_model_range(crops[:, None]), labels[index]

    return sample_batch


def classification_loss(model, batch, *, generator):
    return F.cross_entropy(model(batch[0]), batch[1])


@torch.no_grad()
def test_accuracy(classifier, judge):
    found = [classifier(x.to(judge.device)).argmax(dim=1).cpu() for x in judge.test.split(500)]
    return (torch.cat(found) == judge.labels).double().mean().item()


def train_classifier(device):
    """Train FashionClassifier by cross-entropy; record its accuracy on the test images."""
    images, labels = (x.to(device) for x in helpers.load_fashion_mnist("train"))
    config = {"network": "FashionClassifier", "steps": 4000, "batch": BATCH, "lr": 2e-3}
    config |= {"ema": 0.999, "seed": 0, "augmentation": "mirrored, shifted by up to 2 pixels"}
    helpers.train_or_load(
        "classifier",
        lambda: helpers.FashionClassifier(pretrained=False),
        classification_loss,
        augmented_batches(images, labels),
        config=config,
        device=device,
        retrain=True,
    )
    accuracy = test_accuracy(helpers.FashionClassifier().to(device), Judge(device))
    save_record("classifier", ["classifier"], {"test_accuracy": accuracy})
    print(f"classifier: test accuracy {accuracy:.4f}")


def evaluate_floor(judge, device, draws=10):
    """What perfect samples would score: the Frechet distance of n training images."""
    train, _ = helpers.load_fashion_mnist("train")
    generator, rows = helpers.make_generator(SEED), []
    for n in (500, 1000, 2000):
        index = torch.randperm(len(train), generator=generator)[: draws * n]
        sets = judge.features(helpers.to_model_range(train[index])).split(n)
        values = [helpers.frechet_distance(x, judge.test_features) for x in sets]
        rows.append({"n": n, "mean": statistics.mean(values), "std": statistics.stdev(values)})
        print(rows[-1], flush=True)
    save("floor", ["classifier"], rows, device, draws=draws)


def straight_field(velocity, scheduler):
    """The velocity of the linear path, from that of a network trained along a scheduler.

    The inverse of helpers.reschedule: with c = alpha + beta at the time t where alpha / c is the
    level s, u'_s(x) = (u_t(c x) - c_dot x) / (c s_dot). Levels below 0.01 are asked at 0.01, where
    c s_dot is not yet 0 for any schedule.
    """

    def straight(x, s):
        t = time_at_level(scheduler, s.clamp(min=0.01)).to(x.dtype)
        alpha_dot, beta_dot = scheduler.alpha_dot(t), scheduler.beta_dot(t)
        alpha, beta = scheduler.alpha(t), scheduler.beta(t)
        scale, growth = (helpers.expand_like(v, x) for v in (alpha + beta, alpha_dot + beta_dot))
        speed = helpers.expand_like(alpha_dot * beta - alpha * beta_dot, x) / scale
        return (velocity(scale * x, t) - growth * x) / speed

    return straight


def time_at_level(scheduler, level):
    """The t (B,) at which alpha / (alpha + beta), which increases, is the level (B,); float64."""
    level, low = level.double().clamp(0, 1), torch.zeros_like(level, dtype=torch.float64)
    width = 0.5
    for _ in range(50):  # bisection
        t = low + width
        alpha = scheduler.alpha(t)
        low = torch.where(alpha <= level * (alpha + scheduler.beta(t)), t, low)
        width /= 2
    return low


TIMES = [0.05 + 0.1 * k for k in range(10)]


@torch.no_grad()
def evaluate_fit(judge, device, n=10_000, least=2000):
    """Question 4(b): flow_linear and the exact minimiser of its loss, by time, on both sets.

    A training and a test image share t and noise; the minimiser on the first `least` of each time.
    """
    train, _ = helpers.load_fashion_mnist("train")
    generator = helpers.make_generator(SEED)
    pixels = helpers.to_model_range(train)
    chosen = torch.randperm(len(train), generator=generator)[:n].reshape(10, -1)
    sets = {"training": pixels[chosen], "test": judge.test[:n].reshape(10, -1, 1, 28, 28)}
    path = helpers.GaussianPath(helpers.LinearScheduler())
    network = helpers.load_weights(UNet(), "flow_linear").to(device)

    def minimiser(x, t):
        return helpers.empirical_velocity(pixels.to(device), x, t, path.scheduler)

    rows, noise = [], torch.randn(n, 1, 28, 28, generator=generator).reshape(10, -1, 1, 28, 28)
    gaps = {}
    for field, velocity, count in (("network", network, n), ("minimiser", minimiser, least)):
        for images, data in sets.items():
            losses = []
            for t, z, eps in zip(TIMES, data, noise, strict=True):
                pair = z[: count // 10].split(100), eps[: count // 10].split(100)
                for z, eps in zip(*pair, strict=True):
                    z, eps, at = z.to(device), eps.to(device), torch.full((len(z),), t).to(device)
                    error = velocity(path.sample(z, at, eps), at) - path.velocity_target(z, at, eps)
                    losses.append(error.square().flatten(1).mean(dim=1).cpu())
            losses = gaps[field, images] = torch.cat(losses).reshape(10, -1)
            error = losses.std(dim=1) / losses.shape[1] ** 0.5
            row = {"field": field, "images": images, "each": losses.shape[1]}
            rows.append({**row, "mean": losses.mean(dim=1).tolist(), "error": error.tolist()})
            print(rows[-1], flush=True)
    gap = gaps["network", "test"] - gaps["network", "training"]  # of pairs
    settings = {"n": n, "times": TIMES, "gap": gap.mean().item()}
    settings["gap_error"] = (gap.var(dim=1).mean() / n).sqrt().item()
    save("fit", ["flow_linear"], rows, device, **settings)


def bootstrap(judge, features, draws=200):
    """Standard errors over draws of the samples of each Frechet distance, and of the difference
    to the first, the same draws for all; features: a list of (N, F) of the same noise."""
    generator, values = helpers.make_generator(SEED), []
    for _ in range(draws):
        index = torch.randint(len(features[0]), (len(features[0]),), generator=generator)
        values.append([helpers.frechet_distance(f[index], judge.test_features) for f in features])
    values = torch.tensor(values)
    return values.std(dim=0).tolist(), (values - values[:, :1]).std(dim=0).tolist()


@torch.no_grad()
def nearest_distances(x, pixels):
    """Root mean square per pixel to the nearest training image, (N,): of x, mirrored or shifted by
    up to a pixel as well. The nearest is found by matrix products and its distance then taken."""
    flat, best = pixels.flatten(1), torch.full((len(x),), torch.inf)
    half = flat.square().sum(dim=1) / 2
    for mirrored, down, right in itertools.product((False, True), (0, 1, 2), (0, 1, 2)):
        y = F.pad(x.flip(3) if mirrored else x, (1, 1, 1, 1), value=-1.0)
        y = y[:, :, down : down + 28, right : right + 28].flatten(1)
        index = torch.cat([(c @ flat.T - half).argmax(dim=1) for c in y.split(250)])
        best = torch.minimum(best, (y - flat[index]).square().mean(dim=1).sqrt())
    return best


def denoising_excess(flows, judge, device, n=300):
    """Error of E[z | x] on n test images at ten levels, over that of the first network: means and
    standard errors, relative; all networks see the same corrupted images."""
    path = helpers.GaussianPath(helpers.LinearScheduler())
    z = judge.test[:n].to(device)
    eps = torch.randn(z.shape, generator=helpers.make_generator(SEED)).to(device)
    found = []
    for velocity in flows.values():
        errors = []
        for level in TIMES:
            s = torch.full((n,), level, device=device)
            x = path.sample(z, s, eps)
            with torch.no_grad():
                u = torch.cat([velocity(*c) for c in zip(x.split(100), s.split(100), strict=True)])
            error = path.velocity_to_data(u, x, s) - z
            errors.append(error.square().flatten(1).mean(dim=1).cpu())
        found.append(torch.stack(errors))  # (levels, images)
    excess = [(e - found[0]) / found[0].mean(dim=1, keepdim=True) for e in found]
    return [(e.mean(dim=1).tolist(), (e.std(dim=1) / n**0.5).tolist()) for e in excess]


def evaluate_flows(judge, device, n=2000, nfe=32):
    """Questions 4(c), 4(d): the three flows, all on the straight path and one grid.

    Adams-Bashforth 2 on helpers.sampling_grid, float32, one noise: what differs is the training.
    Of flow_linear also the distances to the nearest training image.
    """
    train, _ = helpers.load_fashion_mnist("train")
    pixels, grid = helpers.to_model_range(train), helpers.sampling_grid(nfe)
    flows, features, rows = {}, [], []
    for name, scheduler in helpers.SCHEDULERS.items():
        network = helpers.load_weights(UNet(), f"flow_{name}").to(device)
        flows[f"flow_{name}"] = network if name == "linear" else straight_field(network, scheduler)
    for name, velocity in flows.items():

        def solve(x0, generator, velocity=velocity):
            return helpers.adams_bashforth2(velocity, x0, grid)

        x = sample(solve, n, device, "float32")
        if name == "flow_linear":
            first = x.clamp(-1, 1)
        features.append(judge.features(x))
        away = (x.clamp(-1, 1) - first).square().flatten(1).mean(dim=1).sqrt()
        rows.append({"network": name, **judge.measure(x), "rms_to_linear": away.mean().item()})
        print(rows[-1], flush=True)
    for row, error, difference in zip(rows, *bootstrap(judge, features), strict=True):
        row |= {"frechet_error": error, "difference_error": difference}
    for row, excess in zip(rows, denoising_excess(flows, judge, device), strict=True):
        row |= {"excess": excess[0], "excess_error": excess[1]}
    distances = {"samples": first, "test images": judge.test[:n]}
    distances = {k: nearest_distances(x, pixels).tolist() for k, x in distances.items()}
    settings = {"n": n, "nfe": nfe, "dtype": "float32", "levels": TIMES}
    settings["nearest"] = {k: [round(v, 4) for v in values] for k, values in distances.items()}
    networks = [*flows, "classifier"]
    save("flows", networks, rows, device, **settings)


@torch.no_grad()
def evaluate_places(judge, device, n=32, reference=128):
    """Question 4(d): error of the solver by place of the steps, clock and curve, flow_linear.

    Places are those of equal steps in t along a schedule, as levels s = alpha / (alpha + beta);
    the curve is the linear path, the same in the time of the cosine schedule ("clock": what a
    multistep method extrapolates in), or the cosine schedule's path. Root mean square to a
    fine solution of the same noise, for each of n images, and what is left in the corners.
    """
    velocity = helpers.load_weights(UNet(), "flow_linear").to(device)
    cosine = helpers.SCHEDULERS["cosine"]

    def level(t):
        return cosine.alpha(t) / (cosine.alpha(t) + cosine.beta(t))

    clock = helpers.FunctionScheduler(level, lambda t: 1 - level(t))
    curves = {"straight": velocity, "clock": helpers.reschedule(velocity, clock)}
    curves["cosine"] = helpers.reschedule(velocity, cosine)
    noise = torch.randn(n, 1, 28, 28, generator=helpers.make_generator(SEED)).to(device)
    fine = helpers.adams_bashforth2(velocity, noise, helpers.sampling_grid(reference))
    solvers = {"Adams-Bashforth 2": (helpers.adams_bashforth2, 1), "Heun": (helpers.heun, 2)}
    rows = []
    for (solver, (solve, calls)), nfe, curve in itertools.product(
        solvers.items(), (8, 16, 32), curves
    ):
        u = helpers.time_grid(nfe // calls)
        places = {"equal": u, "cosine": level(u)}
        places |= {"polynomial": u**2, "grid": helpers.sampling_grid(nfe // calls)}
        for place, s in places.items():
            ts = s if curve == "straight" else time_at_level(cosine, s)
            ts[0], ts[-1] = 0, 1
            x = solve(curves[curve], noise, ts)
            errors = (x - fine).square().flatten(1).mean(dim=1).sqrt().cpu()
            row = {"solver": solver, "nfe": nfe, "curve": curve, "place": place}
            rows.append({**row, "errors": [round(e, 5) for e in errors.tolist()]})
            rows[-1]["residual_noise"] = helpers.residual_noise(x)
        print(rows[-1], flush=True)
    settings = {"n": n, "reference": reference, "dtype": "float32"}
    settings["reference_noise"] = helpers.residual_noise(fine)
    save("places", ["flow_linear"], rows, device, **settings)


def sample_finely(velocity, n, device, dtype):
    """n samples with 64 evaluations of Heun's method, with shorter steps near t = 1."""
    ts = helpers.sampling_grid(32)
    return sample(lambda x0, generator: helpers.heun(velocity, x0, ts), n, device, dtype)


def evaluate_quality(judge, device, n=10_000):
    """flow_linear at N = 10 000 with 64 evaluations, and training images in its place."""
    velocity = helpers.load_weights(UNet(), "flow_linear").to(device)
    dtype = helpers.choose_dtype(velocity, device)
    train, _ = helpers.load_fashion_mnist("train")
    index = torch.randperm(len(train), generator=helpers.make_generator(SEED))[:n]
    real = helpers.to_model_range(train[index])
    rows = []
    for name, x in (
        ("training images", real),
        ("flow_linear", sample_finely(velocity, n, device, dtype)),
    ):
        rows.append({"samples": name, **judge.measure(x), **judge.coverage(x)})
        print(rows[-1], flush=True)
    networks = ["flow_linear", "classifier"]
    save("quality", networks, rows, device, n=n, nfe=64, dtype=dtype)


def evaluate_plain_recipe(judge, device, n=10_000):
    """The same for the plain recipe of public course labs; its weights are not kept."""
    config = {"steps": 5000, "batch": 250, "lr": 1e-3, "seed": 0}
    start = time.perf_counter()
    model, losses = baseline.train(device, **config)
    config |= {"seconds": time.perf_counter() - start, "last_loss": losses[-500:].mean().item()}
    config |= {"parameters": sum(p.numel() for p in model.parameters())}
    dtype = helpers.choose_dtype(model, device)
    x = sample_finely(model, n, device, dtype)
    row = {"samples": "plain recipe", **judge.measure(x), **judge.coverage(x)}
    settings = {"training": config, "n": n, "nfe": 64, "dtype": dtype}
    save("plain_recipe", ["classifier"], [row], device, **settings)


def evaluate_guidance(judge, device, n=1000):
    """flow_labels with classifier-free guidance: labels in equal number, Heun's method."""
    model = helpers.load_weights(UNet(num_classes=10), "flow_labels").to(device)
    dtype = helpers.choose_dtype(model, device)
    labels, ts = torch.arange(BATCH, device=device) % 10, helpers.time_grid(16)
    asked = labels.cpu().repeat(n // BATCH)
    of_test = mean_spread(judge.test_features, judge.labels)
    rows = []
    for guidance in (1, 1.5, 2, 4):
        velocity = helpers.guided_velocity(model, labels, guidance)

        def solve(x0, generator, velocity=velocity):
            return helpers.heun(velocity, x0, ts)

        x = sample(solve, n, device, dtype)
        features = judge.features(x)
        accuracy = (judge.classes(features) == asked).double().mean().item()
        spread = mean_spread(features, asked) / of_test
        row = {"guidance": guidance, "accuracy": accuracy, "spread": spread, **judge.measure(x)}
        rows.append(row)
        print(row, flush=True)
    save("guidance", ["flow_labels", "classifier"], rows, device, n=n, dtype=dtype)


def evaluate_lessons(judge, device, n=10_000, nfe=16, steps=400, trainings=3):
    """Classifiers trained on n labelled samples of flow_labels, or on as many real images: their
    accuracy on the test images, for so many trainings each."""
    model = helpers.load_weights(UNet(num_classes=10), "flow_labels").to(device)
    asked, ts = torch.arange(BATCH, device=device) % 10, helpers.sampling_grid(nfe)

    def solve(x0, generator):
        return helpers.adams_bashforth2(lambda x, t: model(x, t, asked), x0, ts)

    x = sample(solve, n, device, "float32")
    drawn = (255 * helpers.to_image_range(x)).round().to(torch.uint8)
    images, labels = helpers.load_fashion_mnist("train")
    first = torch.cat([(labels == k).nonzero()[: n // 10, 0] for k in range(10)])
    sets = {"samples": (drawn, asked.cpu().repeat(n // BATCH))}
    sets["real images"] = images[first], labels[first]
    rows, lr = [], 2e-3
    for name, content in sets.items():
        batches, accuracies = augmented_batches(*(part.to(device) for part in content)), []
        for seed in range(trainings):
            torch.manual_seed(seed)
            classifier = helpers.FashionClassifier(pretrained=False).to(device)
            options = {"steps": steps, "lr": lr, "seed": seed, "ema": 0.99}
            helpers.train(classifier, classification_loss, batches, **options)
            accuracies.append(test_accuracy(classifier, judge))
        rows.append({"trained on": name, "accuracies": accuracies})
        print(rows[-1], flush=True)
    settings = {"n": n, "nfe": nfe, "dtype": "float32", "steps": steps, "batch": BATCH, "lr": lr}
    save("lessons", ["flow_labels"], rows, device, **settings)


def mean_spread(features, labels):
    """Root mean squared distance of features to the mean of their class, mean over classes."""
    groups = [features[labels == label] for label in labels.unique()]
    return statistics.mean(g.var(dim=0).sum().sqrt().item() for g in groups)


def evaluate_score_losses(device, steps=3000, batch=512, lr=5e-3):
    """Question 5(a): what the network returns x the loss x three seeds, against the exact score.

    The loss as printed, on all times or on t <= 1 - delta; or weighted by beta^2.
    """
    angles = torch.arange(5) * 2 * torch.pi / 5
    data = {
        "means": (2 * torch.stack([angles.cos(), angles.sin()], dim=1)).tolist(),
        "stds": [0.15, 0.25, 0.35, 0.25, 0.15],
        "weights": [1.0, 2.0, 3.0, 2.0, 1.0],
    }
    mixture = helpers.GaussianMixture(**data)
    path = helpers.GaussianPath(helpers.LinearScheduler())
    levels = [*TIMES, 0.98, 0.995]
    losses = [("printed", 0.0), ("printed", 0.01), ("printed", 0.1), ("weighted", 0.0)]
    rows = []
    for returns, (kind, delta), seed in itertools.product(("s", "noise"), losses, range(3)):

        def loss(model, z, *, generator, weighted=kind == "weighted", delta=delta):
            def times(n, generator):
                return (1 - delta) * torch.rand(n, generator=generator, device=generator.device)

            options = {"weighted": weighted, "times": times, "generator": generator}
            return helpers.score_matching_loss(model, z, path, **options)

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = helpers.MLP()
        model = (helpers.NoiseScore(net, path) if returns == "noise" else net).to(device)
        helpers.train(model, loss, mixture_batches(mixture, batch), steps=steps, lr=lr, seed=seed)
        case = {"returns": returns, "loss": kind, "delta": delta, "seed": seed}
        rows.append({**case, "errors": score_errors(model.cpu(), mixture, path, levels)})
        print(case, " ".join(f"{e:.2f}" for e in rows[-1]["errors"]), flush=True)
    settings = {"mixture": data, "levels": levels, "steps": steps, "batch": batch, "lr": lr}
    save("score_losses", [], rows, device, **settings)


def mixture_batches(mixture, batch):
    """sample_batch of a mixture for train."""
    return lambda generator: mixture.sample(batch, generator=generator)


@torch.no_grad()
def score_errors(score, mixture, path, levels, n=4000):
    """Error of a score relative to the exact one, root mean squares over p_t, for each level."""
    generator, errors = helpers.make_generator(SEED), []
    for level in levels:
        marginal = mixture.at_time(path.scheduler, level)
        x = marginal.sample(n, generator=generator)
        exact = marginal.score(x)
        error = score(x, torch.full((n,), level)) - exact
        errors.append((error.norm() / exact.norm()).item())
    return errors


def exact_steps(velocity, ts, kept):
    """A solver of (3) on the linear path, exact for fixed E[z | x_t], as in notebook 05.

    kept(t, t_next): the part of the noise that a step keeps; the rest of it is renewed.
    """

    @torch.no_grad()
    def solve(x, generator):
        for t, t_next in itertools.pairwise(ts.tolist()):
            u, rho = velocity(x, x.new_full(x.shape[:1], t)), kept(t, t_next)
            fresh = torch.randn(x.shape, generator=generator).to(x)
            noise = rho * (x - t * u) + math.sqrt(1 - rho**2) * fresh
            x = t_next * (x + (1 - t) * u) + (1 - t_next) * noise
        return x

    return solve


def evaluate_sigma(judge, device, n=500, sets=5):
    """Question 5(b): Euler-Maruyama on eq. (3), with the trained velocity and score; remedies.

    On a CPU this takes hours: every row is kept, and a run that was cut off goes on.
    """
    path = helpers.GaussianPath(helpers.LinearScheduler())
    velocity = helpers.load_weights(UNet(), "flow_linear").to(device)
    net = helpers.load_weights(UNet(), "score_linear").to(device)
    dtype, score = helpers.choose_dtype(velocity, device), helpers.NoiseScore(net, path)

    def euler(sigma, steps):
        drift, ts = helpers.sde_drift(velocity, score, sigma), helpers.time_grid(steps)
        return lambda x, generator: helpers.euler_maruyama(drift, sigma, x, ts, generator=generator)

    ts = helpers.time_grid(50)
    remedies = {
        "1, last 5 quiet": euler(lambda t: 1.0 * (t < 0.9 - 1e-3), 50),
        "1, exact steps": exact_steps(
            velocity, ts, lambda t, s: math.exp(0.5 / (1 - t) - 0.5 / (1 - s)) if s < 1 else 0.0
        ),
        "sqrt(2 beta), exact steps": exact_steps(velocity, ts, lambda t, s: (1 - s) / (1 - t)),
        "reversal, exact steps": exact_steps(
            velocity, ts, lambda t, s: t * (1 - s) / (s * (1 - t))
        ),
    }
    cases = [(label, 50, 0, solve) for label, solve in remedies.items()]
    for number, steps, (label, sigma) in itertools.product(range(sets), (50, 25), SIGMAS.items()):
        if number == 0 or (steps == 50 and label not in ("1", "2")):  # one set where all is clear
            cases.append((label, steps, number, euler(sigma, steps)))

    networks = ["flow_linear", "score_linear", "classifier"]
    settings = {"n": n, "dtype": dtype}
    kept, rows = kept_rows("sigma.part", networks, device, **settings), []
    for label, steps, number, solve in cases:
        case = {"sigma": label, "steps": steps, "set": number}
        done = [row for row in kept if case.items() <= row.items()]
        if not done:
            x = sample(solve, n, device, dtype, SEED + number)
            done = [{**case, **judge.measure(x)}]
            print(done[0], flush=True)
            save("sigma.part", networks, rows + done, device, **settings)
        rows += done
    save("sigma", networks, rows, device, **settings)
    new_record("sigma.part").unlink()


def late_half(late):
    """A sampler of times: half of them uniform, half late(u) with u uniform on [0, 1]."""

    def times(n, generator):
        uniform, u = torch.rand(2, n, generator=generator)
        return torch.where(torch.rand(n, generator=generator) < 0.5, late(u), uniform)

    return times


def sample_dogs(kind, net, path, noise, generator, steps=200):
    """{sampler: points} from noise (N, 2), with as many evaluations of the network each.

    Score: reverse SDE and probability-flow ODE (Heun) of the variance-preserving path, on a grid
    with equal steps in log(alpha / beta) that ends at beta = 0.02 with the posterior mean. Flow:
    Heun's method on a grid that is fine at the end.
    """
    if kind == "flow":
        ts = 1 - (1 - helpers.time_grid(steps // 2)) ** 2
        return {"ODE": helpers.heun(net, noise, ts)}
    score, rows = helpers.NoiseScore(net, path), {}

    def drift(x, t, factor):
        return (x + factor * score(x, t)) / helpers.expand_like(t, x)

    def end(x, t):
        t = t.expand(len(x))
        u = path.score_to_velocity(score(x, t), x, t)
        return path.velocity_to_data(u, x, t).detach()

    ts = log_snr_grid(steps)
    sde = functools.partial(drift, factor=2)
    x = helpers.euler_maruyama(sde, lambda t: torch.sqrt(2 / t), noise, ts, generator=generator)
    rows["SDE"] = end(x, ts[-1])
    ts = log_snr_grid(steps // 2)
    rows["ODE"] = end(helpers.heun(functools.partial(drift, factor=1), noise, ts), ts[-1])
    return rows


def log_snr_grid(steps, first=0.1, last_beta=0.02):
    """Times on the variance-preserving path with equal steps in log(alpha / beta)."""
    ends = [first / math.sqrt(1 - first**2), math.sqrt(1 - last_beta**2) / last_beta]
    ratio = torch.exp(helpers.time_grid(steps, *map(math.log, ends)))
    return ratio / torch.sqrt(1 + ratio**2)


def evaluate_dogs(device, steps=3000, batch=256, lr=4e-3, hidden=128, octaves=5, n=3000):
    """Beyond: score and flow from noise to the dog, by the times of training; three trainings.

    Equal networks and budgets; 10^4 MMD^2 to fresh dogs at bandwidth 0.1, mean of blocks of 500.
    """
    generator = helpers.make_generator(SEED)
    dogs = helpers.silhouette("dog", 100_000, generator=generator)
    real, again, noise = (
        helpers.silhouette("dog", n, generator=generator),
        helpers.silhouette("dog", n, generator=generator),
        torch.randn(n, 2, generator=generator),
    )
    preserving = helpers.FunctionScheduler(lambda t: t, lambda t: torch.sqrt(1 - t**2))
    score_path = helpers.GaussianPath(preserving)
    flow_path = helpers.GaussianPath(helpers.LinearScheduler())

    def score_loss(net, z, *, generator, times):
        score, options = helpers.NoiseScore(net, score_path), {"times": times}
        return helpers.score_matching_loss(score, z, score_path, generator=generator, **options)

    def flow_loss(net, z, *, generator, times):
        return helpers.flow_matching_loss(net, z, flow_path, generator=generator, times=times)

    def distance(x):
        pairs = zip(x.split(500), real.split(500), strict=True)
        values = [1e4 * helpers.mmd2(a, b, 0.1) for a, b in pairs]
        return {
            "mmd2": statistics.mean(values),
            "error": statistics.stdev(values) / len(values) ** 0.5,
        }

    def late_score(u):  # log beta uniform on [log 0.02, 0]
        return torch.sqrt(1 - 0.02 ** (2 * u))

    def late_flow(u):  # log(1 - t) uniform
        return 1 - 0.02**u

    kinds = {
        "score": (score_path, score_loss, late_score, lambda t: torch.log(1 - t**2 + 1e-4) / 2),
        "flow": (flow_path, flow_loss, late_flow, lambda t: torch.log(1 - t + 0.01)),
    }
    rows = [{"network": "fresh dogs", "times": "", "seed": 0, "sampler": "", **distance(again)}]
    for seed, kind, times in itertools.product(range(3), kinds, ("uniform", "half late")):
        path, loss, late, time_input = kinds[kind]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = helpers.MLP(2, hidden, 4, octaves=octaves, time_input=time_input)
        loss = functools.partial(loss, times=late_half(late) if times == "half late" else None)

        def sample_batch(generator):
            return dogs[torch.randint(len(dogs), (batch,), generator=generator)]

        helpers.train(net, loss, sample_batch, steps=steps, lr=lr, seed=seed)
        case = {"network": kind, "times": times, "seed": seed}
        for sampler, x in sample_dogs(kind, net, path, noise, generator).items():
            rows.append({**case, "sampler": sampler, **distance(x)})
            print(rows[-1], flush=True)
    settings = {"n": n, "steps": steps, "batch": batch, "lr": lr, "hidden": hidden}
    save("dogs", [], rows, device, **settings, bandwidth=0.1)


JOBS = {
    "floor": evaluate_floor,
    "guidance": evaluate_guidance,
    "quality": evaluate_quality,
    "lessons": evaluate_lessons,
    "fit": evaluate_fit,
    "flows": evaluate_flows,
    "places": evaluate_places,
    "plain_recipe": evaluate_plain_recipe,
    "score_losses": lambda judge, device: evaluate_score_losses(torch.device("cpu")),
    "dogs": lambda judge, device: evaluate_dogs(torch.device("cpu")),
    "sigma": evaluate_sigma,
}


def record(name):
    """The record of this name for a notebook: read, or made anew where its weights are new."""
    try:
        return helpers.load_record(name)
    except ValueError:
        main([name])
        return helpers.load_record(name)


def main(names):
    if "--in-place" in names:
        names.remove("--in-place")
        os.environ["FLOW_OUTPUT"] = str(helpers.ROOT)
    if {"-h", "--help"} & {*names}:
        return print(__doc__)
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
