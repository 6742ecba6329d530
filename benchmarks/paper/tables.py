"The tables, in the order of RESULTS.md"
import cyc_table2

TABLES = dict(cyc_table2=cyc_table2)
