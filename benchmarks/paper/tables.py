"The tables, in the order in which they are filled"

import bimp_table1
import bimp_table2
import cst_cycles
import cyc_table2
import cyc_table5
import ocp_table2
import ocp_table3
import ocp_table4
import scyc_table2

TABLES = {
    t.__name__: t
    for t in (
        cyc_table2,
        cyc_table5,
        ocp_table2,
        ocp_table4,
        scyc_table2,
        bimp_table1,
        bimp_table2,
        cst_cycles,
        ocp_table3,
    )
}


def tables_at(scale):
    "Names of the tables that are run at a scale: all, but at the scale *trained*, where there is not the time"
    return [name for name, t in TABLES.items() if not scale.network or hasattr(t, 'at_trained')]
