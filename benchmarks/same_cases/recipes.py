"Cases of recipes: cycles, rounds, tickets, sweeps"

import contextlib
from functools import partial
from inspect import signature

from fastai.basics import Learner, params

from .common import RETRAINING, Crash, case, copies, each, fp, learner, outcome, short, weights_and_masks


@each(
    {
        'usual': dict(),
        'step': dict(schedule=fp.one_shot, restart=0.3),
        'control': dict(prune_cycles=1, track=True),
        'filters': dict(granularity='filter', scope='global', recover='alive', initial=0.2),
        'groups': dict(lr_max=slice(1e-3, 1e-2), reset_opt=True, wd=0.1, criterion=fp.taylor, ramp=0.5),
    }
)
def fit_cyclical(kwargs, folder):
    learn = learner(folder, splitter=lambda m: [params(m[:2]), params(m[2:])])
    return outcome(learn, learn.fit_cyclical(2, 1, 0.8, **{'lr_max': 0.02, **kwargs}))


def fit_cycles(learn):
    return getattr(learn, 'fit_cycles', None) or learn.fit_cyclic


@case
def cycles_and_paths(folder):
    "Cyclic training of a sparse network, and the paths between the ends of cycles"
    learn = learner(folder)
    learn.prune(0.8, fp.random_score, 'erk')
    flips = fp.SignFlips(5)
    ends = fit_cycles(learn)(3, 1, lr=0.02, ends=True, cbs=flips)
    paths = learn.cycle_paths(ends, n=4)
    res = dict(ends=ends, paths=paths.df, flips=[flips.iters, flips.flips], between=learn.sign_flips(ends[0]))
    return outcome(learn) | res | {'overlap': learn.mask_overlap({'one': learn.masks})}


@each({'usual': dict(), 'snip': dict(criterion=fp.snip, start_scope='global', n_batches=2, exclude='0.*')})
def fit_sculpt(kwargs, folder):
    learn = learner(folder)
    return outcome(learn, learn.fit_sculpt(0.9, 0.6, 1, 1, lr=0.02, **kwargs))


@each({k: dict(schedule=k) for k in RETRAINING} | {'given': dict(history=[0.02, 0.01], discount=0.3, warmup=0.2)})
def retrain(kwargs, folder):
    learn = learner(folder)
    learn.fit_one_cycle(2, 0.02)
    res = {}
    for s in (0.6, 0.8):
        learn.prune(s, scope='global')
        learn.retrain(1, **kwargs)
        res[str(s)] = copies(learn)
    return outcome(learn) | res


@each({'usual': dict(), 'cycles': dict(cycles=3, dense_epochs=1, track=True), 'local': dict(scope='local', wd=0.1)})
def fit_bimp(kwargs, folder):
    learn = learner(folder)
    return outcome(learn, learn.fit_bimp(3, 0.9, lr_max=0.02, **kwargs))


RESUMED = {
    'bimp': lambda learn, cbs: learn.fit_bimp(3, 0.9, cycles=2, lr_max=0.02, cbs=cbs),
    'sculpt': lambda learn, cbs: learn.fit_sculpt(0.9, 0.6, 2, 1, lr=0.02, cbs=cbs),
    'cyclical': lambda learn, cbs: learn.fit_cyclical(3, 1, 0.8, track=True, lr_max=0.02, cbs=cbs),
}


@each(RESUMED)
def recipe_resumed(fit, folder):
    "Stop a recipe, and start it again in a new Learner"
    with contextlib.suppress(InterruptedError):
        fit(learner(folder), [fp.Checkpoint('run'), Crash()])
    learn = learner(folder)
    return outcome(learn, fit(learn, [fp.Checkpoint('run')]))


def rate_of(recipe, rate):
    "The pruning rate, under the name of the recipe's argument"
    return {'prune_rate' if 'prune_rate' in signature(recipe).parameters else 'rate': rate}


def rounds_of(recipe, *args, rate=0.4, **kwargs):
    table = recipe(*args, **rate_of(Learner.iterative_prune, rate), **kwargs)
    return dict(rounds=table, histograms=[[h.gradients, h.hidden] for h in getattr(table, 'histograms', None) or []])


S_CYC = partial(fp.s_cyc_max_lr, eps=0.01, delta=0.02)
ITERATIVE = {
    'lr': dict(),
    'weights': dict(rewind='weights', max_lr=S_CYC),
    'weights late': dict(rewind='weights', rewind_to=7, early_stop=True, seed=3),
    'finetune': dict(rewind='finetune', histograms=True),
    'finetune slice': dict(rewind='finetune', lr=slice(1e-3, 1e-2), scope='local', criterion=fp.taylor, n_batches=2),
    'trained': dict(train_first=False, scope='erk', shape=fp.lr_decay, max_lr=0.01),
    'filters': dict(granularity='filter', patience=1, monitor='accuracy', exclude='0.*', wd=0.1),
}


@each(ITERATIVE)
def iterative_prune(kwargs, folder):
    learn = learner(folder, splitter=lambda m: [params(m[:2]), params(m[2:])])
    return rounds_of(learn.iterative_prune, 2, 2, **{'lr': 0.02, **kwargs}) | outcome(learn)


@each({k: ITERATIVE[k] for k in ('lr', 'weights', 'weights late', 'finetune')})
def iterative_prune_resumed(kwargs, folder):
    "One round, then a second round in a new Learner"
    for n in (1, 2):
        learn = learner(folder)
        res = rounds_of(
            learn.iterative_prune, n, 1, lr=0.02, folder=folder / 'rounds', test_dl=learn.dls.train, **kwargs
        )
    return res | weights_and_masks(learn)


@each({'usual': dict(), 'weights': dict(rewind='weights', monitor='valid_loss', feasible=0.1)})
def s_cyc_oracle(kwargs, folder):
    learn = learner(folder)
    return rounds_of(learn.s_cyc_oracle, 2, 1, [0.005, 0.02, 0.05], **kwargs) | outcome(learn)


def parts_of(ticket):
    story = {k: ticket.story.get(k) for k in ('round', 'seed', 'start', 'kind', 'kind_seed')}
    names = 'state masks metrics initial names end'.split()
    return {'sparsity': ticket.sparsity, **story, **{k: getattr(ticket, k) for k in names}}


TICKETS = {
    'weights': dict(ends=True, measure='all'),
    'late': dict(rewind_to='1 epoch', scope='local', seed=2),
    'part': dict(rewind_to=0.2, schedule=fp.cubic, interval=3),
    'lr': dict(rewind='lr', criterion=fp.taylor, n_batches=2),
    'finetune': dict(rewind='finetune', schedule=fp.ocp, scope='erk', exclude='0.*'),
    'rates': dict(max_lr=S_CYC, granularity='kernel', include='?.0.weight', measure='none'),
}


@each(TICKETS)
def find_tickets(kwargs, folder):
    learn = learner(folder)
    tickets = learn.find_tickets(2, short, prune_rate=0.4, **kwargs)
    res = dict(
        table=tickets.df, **{f'ticket {i}': parts_of(t) for i, t in enumerate(tickets)}, **weights_and_masks(learn)
    )
    made = {k: getattr(tickets[-1], k)(5) for k in ('reinit', 'shuffle')} | {'dense': tickets[-1].dense()}
    tickets[-1].save(folder / 'ticket')
    made['loaded'] = fp.Ticket.load(folder / 'ticket')
    return res | {k: parts_of(t) for k, t in made.items()}


@each({k: TICKETS[k] for k in ('weights', 'late', 'part', 'lr', 'finetune')})
def find_tickets_resumed(kwargs, folder):
    for n in (1, 2):
        learn = learner(folder)
        tickets = learn.find_tickets(n, short, prune_rate=0.4, folder=folder / 'tickets', **kwargs)
    return dict(table=tickets.df, tickets=[parts_of(t) for t in tickets], **weights_and_masks(learn))


@case
def tickets_compared(folder):
    learn = learner(folder)
    tickets = learn.find_tickets(1, short, prune_rate=0.5, rewind_to=10)
    table = learn.compare_tickets(tickets[1:], short, seeds=(0, 1))
    res = dict(table=table, summary=table.summary(), overlap=fp.mask_overlap(tickets))
    res['by round'] = learn.instability_by_round(tickets, short, n=3)
    res['by name'] = learn.instability_by_round({'a': tickets[1:]}, short, seeds=((0, 1), (2, 3)), n=4, train=True)
    return res | weights_and_masks(learn)


def make_learner(seed, folder):
    return learner(folder)


@each({k: k for k in fp.paper_methods(4, 0.02)})
def sweep(name, folder):
    table = fp.sweep(partial(make_learner, folder=folder), fp.paper_methods(4, 0.02, [name]), [0.8], [1], bar=False)
    return dict(table=table.drop(columns='seconds'))


@case
def search_strength(folder):
    def reached(strength):
        learn = learner(folder)
        learn.fit(1, 0.02, cbs=fp.STR(s_init=-1 / strength))
        return learn.masks.sparsity

    return dict(table=fp.search_strength(reached, 0.5, 0.1, 0.5, tol=0.02, steps=4))
