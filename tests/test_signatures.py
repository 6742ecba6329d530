"What shift-tab shows: every argument of every public call, with its type, default and meaning"

import inspect

import pytest
from fastai.basics import Learner
from fastcore.docments import docments

import fastprune.all as everything

# calls whose other arguments have no fixed names, and why
ANY_NAME = {
    'plot_schedules': "schedules by the user's labels",
    'plot_lrs': "schedules by the user's labels",
    'Ticket': 'the record of how it was found: any numbers and strings',
    'Distill': 'arguments of the loss, which may be a function of the user',
    'learn.fit_cyclic': 'an old name, which hands everything on and goes with the next release',
}


def calls():
    "Name -> function or class: the names of `fastprune.all`, and the methods that the package adds to Learner"
    res = {n: getattr(everything, n) for n in everything.__all__}
    learn = {n: f for n, f in vars(Learner).items() if inspect.isfunction(f) and not hasattr(Learner, f"_orig_{n}")}
    added = {n: f for n, f in learn.items() if f.__module__.startswith("fastprune.") and not n.startswith("_")}
    res.update({f"learn.{n}": f for n, f in added.items()})
    return {n: f for n, f in res.items() if inspect.isfunction(f) or inspect.isclass(f) and own_constructor(f)}


def own_constructor(cls):
    return cls.__init__.__module__.startswith('fastprune.') if inspect.isfunction(cls.__init__) else False


CALLS = calls()


def test_no_call_hides_its_arguments():
    kinds = {n: {p.kind for p in inspect.signature(f).parameters.values()} for n, f in CALLS.items()}
    assert len(CALLS) > 120
    assert {n for n, found in kinds.items() if inspect.Parameter.VAR_KEYWORD in found} == set(ANY_NAME)


def test_classes_show_the_arguments_of_their_constructors():
    "Not those of `__new__`"
    for name, cls in CALLS.items():
        if inspect.isclass(cls):
            shown = [n for n in inspect.signature(cls).parameters if n != 'self']  # fastai's transforms have it
            assert shown == list(inspect.signature(cls.__init__).parameters)[1:], name


def test_every_argument_has_type_default_and_docment():
    problems = []
    for name, f in CALLS.items():
        shown = docments(f, full=True)
        parameters = inspect.signature(f).parameters
        for argument, p in parameters.items():
            if argument == 'self' or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
                continue
            doc = shown[argument]
            if not doc.docment or doc.anno is inspect.Parameter.empty or doc.default is not p.default:
                problems.append(f'{name}({argument}): {doc.docment!r}, {doc.anno!r}, {doc.default!r}')
    assert not problems, '\n'.join(problems)


METHODS = [f for f in CALLS.values() if inspect.isclass(f) and issubclass(f, everything.Method)]


def signature(f):
    return inspect.signature(f).parameters


def needed(method):
    "Values of the arguments without a default, and a sparsity"
    given = dict(sparsity=0.9, dense=0.5, cycles=2, lr_max=0.1)
    return {n: v for n, v in given.items() if n in signature(method)}


@pytest.mark.parametrize('method', METHODS, ids=lambda m: m.__name__)
def test_a_method_names_an_unknown_argument(method):
    with pytest.raises(TypeError, match=f"{method.__name__} has no argument 'sparsty': did you mean 'sparsity'"):
        method(**needed(method), sparsty=0.8)


@pytest.mark.parametrize('method', METHODS, ids=lambda m: m.__name__)
def test_a_method_has_the_defaults_that_it_shows(method):
    given = needed(method)
    made = method(**given)
    for name, p in signature(method).items():
        if name not in given and p.default is not None and name in vars(made):
            assert vars(made)[name] == p.default, name


def test_public_methods_that_replace_fastais_have_a_text():
    replaced = [n for n in vars(Learner) if not n.startswith('_') and hasattr(Learner, f'_orig_{n}')]
    assert replaced and [n for n in replaced if not getattr(Learner, n).__doc__] == []
