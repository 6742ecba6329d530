"The tables, in the order in which they are filled"
import bimp_table1, cst_cycles, cyc_table2, cyc_table5, ocp_table2, ocp_table3, ocp_table4, scyc_table2

TABLES = {t.__name__: t for t in (cyc_table2, cyc_table5, ocp_table2, ocp_table4, scyc_table2, bimp_table1, cst_cycles, ocp_table3)}
