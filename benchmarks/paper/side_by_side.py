"""Trainings of small networks side by side on one GPU: each one's step, with images, gradients and optimizer, is a CUDA
graph on a stream of its own. Masks come from fastprune's engine; between their updates another graph applies them. On a
CPU, steps run one after the other"""

import math
import time

import torch
from torch.nn import functional as F

from fastprune.all import FlipAndShift, Sparsifier

EDGE = FlipAndShift().most
WARM_UP = 4  # steps before a graph is recorded


class Images:
    "Images and classes on a device, ready to be shifted and flipped"

    def __init__(self, dls, device):
        train, test = dls.train.dataset, dls.valid.dataset
        self.x = F.pad(train.x, (EDGE,) * 4).permute(0, 2, 3, 1).contiguous().to(device)  # [n,h+2m,w+2m,3]
        self.y, self.size, self.device = train.y.to(device), train.x.shape[-1], torch.device(device)
        normalize = dls.train.after_batch.fs[-1]
        mean, std = (o.reshape(3).to(device) for o in (normalize.mean, normalize.std))
        self.scale, self.shift = 1 / (255 * std), -mean / std
        self.test = self.normalised(test.x.permute(0, 2, 3, 1).to(device)), test.y.to(device)

    def __len__(self):
        return len(self.y)

    def normalised(self, x):
        "Bytes [n,h,w,3] as numbers [n,3,h,w] in channels-last order"
        return (x.float() * self.scale + self.shift).permute(0, 3, 1, 2)

    def batch(self, idx, down, right, flip):
        "Images `idx`, each shifted and flipped, and their classes"
        pixels = torch.arange(self.size, device=self.device)
        rows = pixels + down[:, None]
        columns = torch.where(flip[:, None] == 1, self.size - 1 - pixels, pixels) + right[:, None]
        return self.normalised(self.x[idx[:, None, None], rows[:, :, None], columns[:, None, :]]), self.y[idx]


class Training:
    "One network in training"

    def __init__(self, model, images, seed, epochs, schedule, bs=256, wd=1e-4, forward=None):
        self.model = model.to(images.device, memory_format=torch.channels_last)
        self.images, self.epochs, self.bs = images, epochs, bs
        self.forward = forward or (lambda model, x: model(x))
        self.steps = len(images) // bs  # of an epoch
        self.random = torch.Generator(images.device).manual_seed(1000 + seed)
        total = epochs * self.steps
        self.rates = torch.tensor([float(schedule(t / total)) for t in range(total)]).to(images.device)
        self.rate = self.rates[0].clone()  # of the optimizer, which needs it on the device
        norms = {p for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d) for p in m.parameters()}
        plain = [p for n, p in model.named_parameters() if p in norms or n.endswith('bias')]  # as in fastai
        groups = [dict(params=plain, weight_decay=0.0)]
        groups.append(dict(params=[p for p in model.parameters() if all(p is not q for q in plain)], weight_decay=wd))
        self.optimizer = torch.optim.SGD(groups, lr=self.rate, momentum=0.9, fused=True)
        self.t = torch.zeros(1, dtype=torch.long, device=images.device)  # steps that were done
        self.order = torch.zeros(4, self.steps, bs, dtype=torch.long, device=images.device)
        self.engine, self.stops, self.weights, self.masks = None, (), [], []
        self.graphs, self.stream = None, None
        self.begin_epoch()

    def prune(self, method, stops=()):
        "Prune by a method, whose engine is called after the steps in which masks change, and after `stops`"
        self.engine = Sparsifier(self.model, method, self.epochs * self.steps, steps_per_epoch=self.steps)
        self.stops = {*self.engine.plan.updates, *stops}
        self.weights = [p.detach() for p in self.engine.weights.values()]
        self.masks = [torch.ones_like(w) for w in self.weights]
        self.hold()

    def hold(self):
        "Apply the engine's masks from now on"
        if self.engine.keeper.masks:
            torch._foreach_copy_(self.masks, [self.engine.keeper.masks[n] for n in self.engine.weights])

    def project(self):
        "What is recorded, too: zeros where weights are pruned"
        if self.masks:
            torch._foreach_mul_(self.weights, self.masks)

    def begin_epoch(self):
        "Draw the order of the images, and how each is shifted and flipped"
        n, images = self.steps * self.bs, self.images
        draw = lambda high: torch.randint(high, (n,), generator=self.random, device=images.device)
        order = torch.randperm(len(images), generator=self.random, device=images.device)[:n]
        drawn = torch.stack([order, draw(2 * EDGE + 1), draw(2 * EDGE + 1), draw(2)])
        self.order.copy_(drawn.view_as(self.order))

    def step(self):
        "What is recorded: a step with the next images"
        self.optimizer.zero_grad()
        self.rate.copy_(self.rates.index_select(0, self.t)[0])
        x, y = self.images.batch(*self.order.index_select(1, self.t % self.steps)[:, 0])
        with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False):
            pred = self.forward(self.model, x)
        F.cross_entropy(pred.float(), y).backward()
        self.optimizer.step()
        self.t += 1

    def record(self):
        "Record the step and the projection as CUDA graphs, and go back to the start"
        start = {n: t.clone() for n, t in self.model.state_dict().items()}
        if self.images.device.type == 'cuda':
            torch.backends.cudnn.benchmark = True
            self.stream = torch.cuda.Stream()
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                for _ in range(WARM_UP):
                    self.step()
                    self.project()
            torch.cuda.synchronize()
            self.graphs = []
            for f in (self.step, self.project) if self.masks else (self.step,):
                self.graphs.append(torch.cuda.CUDAGraph())
                with torch.cuda.graph(self.graphs[-1], stream=self.stream):
                    f()
        else:
            self.step()
        self.model.load_state_dict(start)
        for state in self.optimizer.state.values():
            state['momentum_buffer'].zero_()
        self.t.zero_()

    def run_step(self, t):
        "Step `t` on the training's own stream; without the engine"
        with torch.cuda.stream(self.stream):  # None: as it is
            steps = (self.step, self.project) if self.graphs is None else [g.replay for g in self.graphs]
            for f in steps[:1] if t in self.stops else steps:
                f()

    def update(self, t):
        "The engine's part of step `t`"
        self.engine.t = t
        self.engine.before_step()
        self.engine.after_step()
        self.hold()

    def accuracy(self, bs=2000):
        "On the test images, in percent"
        self.model.eval()
        x, y = self.images.test
        with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False):
            right = sum(int((self.model(x[i : i + bs]).argmax(1) == y[i : i + bs]).sum()) for i in range(0, len(x), bs))
        self.model.train()
        return 100 * right / len(y)


def wait(trainings):
    if trainings[0].images.device.type == 'cuda':
        torch.cuda.synchronize()


def compiled():
    "A forward pass that is compiled once for all networks of one kind"
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(lambda model, x: model(x), dynamic=False)


def run_round(trainings, t):
    "Step `t` of each"
    for o in trainings:
        o.run_step(t)
    if due := [o for o in trainings if t in o.stops]:
        wait(trainings)
        for o in due:
            o.update(t)
        wait(trainings)


def train(trainings, after_epoch=None, limit=math.inf):
    """Train all side by side, with `after_epoch(epoch)` at the end of each epoch, which may remove trainings. Raises
    `TimeoutError` when `time.monotonic()` passes `limit`"""
    epochs, steps = trainings[0].epochs, trainings[0].steps
    for epoch in range(epochs):
        for o in trainings if epoch else ():
            o.begin_epoch()
        wait(trainings)
        for i in range(steps):
            run_round(trainings, epoch * steps + i)
        wait(trainings)
        if epoch + 1 == epochs:
            for o in trainings:
                if o.engine is not None:
                    o.engine.finish()
        if after_epoch is not None:
            after_epoch(epoch)
        if epoch + 1 < epochs and time.monotonic() > limit:
            raise TimeoutError(f'{epoch + 1} of {epochs} epochs were done')
