"Each table of the five papers: what of it is run here, and what is not"

from tell import markdown

# (paper, table, table here, what is not run); the third is '' for a table of which nothing is run
PARTS = [
    ('Cyclical Pruning', '1: the linear model', 'tutorial 03', ''),
    ('Cyclical Pruning', '2: CIFAR-10', 'cyc_table2', 'ResNet-56, VGG-14, MobileNet'),
    ('Cyclical Pruning', '3: four networks; 4: published results', '', 'ImageNet'),
    ('Cyclical Pruning', '5: by cycle', 'cyc_table5', ''),
    ('One-Cycle Pruning', '1: α and β', 'tutorial 18, on digits', 'ResNet-18 on CIFAR-10'),
    ('One-Cycle Pruning', '2: four schedules', 'ocp_table2', 'VGG-16; CIFAR-100, Caltech-101'),
    ('One-Cycle Pruning', '3: budgets', 'ocp_table3', 'CIFAR-100, Caltech-101'),
    ('One-Cycle Pruning', '4 and figure 3: tickets', 'ocp_table4', ''),
    ('S-Cyc', '2a and 9: ResNet-20; 7: its tuned rates', 'scyc_table2', 'tuned rates when pruned by magnitude'),
    ('S-Cyc', '2b and 10: VGG-19; 2c and 11: ResNet-50; 3 and 8: their rates', '', 'VGG-19; ImageNet-200'),
    ('S-Cyc', '5 and 6: ResNet-20 with Adam and RMSProp (1 and 4 are settings)', '', 'all of it, for time'),
    ('Cyclic Sparse Training', 'figure 4: cycles of any mask', 'cst_cycles', 'CIFAR-100, ImageNet'),
    ('Cyclic Sparse Training', 'figures 2c, 3 and 5: what cycles do', 'tutorials 10 and 11, on digits', 'CIFAR-10'),
    ('Cyclic Sparse Training', '1 to 3', '', 'our copy of the paper lacks them'),
    ('Budgeted IMP', '1: retraining schedules', 'bimp_table1', 'ResNet-50 on ImageNet'),
    ('Budgeted IMP', '2: eight methods', 'bimp_table2', 'ResNet-50 on ImageNet; ResNet-56; 70 and 80%'),
    ('Budgeted IMP', 'others', '', 'our copy, a poster, lacks them'),
]


def table(scales):
    "Markdown; `scales`: name of a table here -> the scales that it was run at"
    rows = []
    for paper, what, here, rest in PARTS:
        run = here or 'not run'
        if here and not here.startswith('tutorial'):
            run = f'{here}: {", ".join(scales.get(here, ())) or "not run yet"}'
        rows.append((paper, what, run, rest))
    return markdown(['paper', 'table', 'run here, at the scale', 'not run'], rows)


def rest(df, tables):
    """What the scale *trained* has and has not, where something of it was run; `tables`: name -> table. Otherwise an
    empty string"""
    if not (df.scale == 'trained').any():
        return ''
    some = {name: t.at_trained for name, t in tables.items() if hasattr(t, 'at_trained')}
    at = (f'{name} at {", ".join(f"{100 * s:g}%" for s in sparsities)}' for name, sparsities in some.items())
    return (
        f"At the scale *trained* airbench's network at half its width takes the place of the ResNets, for these tables "
        f'alone: {"; ".join(at)}; cyc_table2 and ocp_table2 without their variants, ocp_table3 with its base '
        'budget, and half of it for OCP and iterative pruning. '
        f'Not run there: {", ".join(t for t in tables if t not in some)}. In ocp_table2, ocp_table3 and bimp_table2, '
        "which prune from scratch, the network's filters are random at first, and not 94% zeros that pass channels on "
        "as airbench's.\n\n"
    )
