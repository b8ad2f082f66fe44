"""What tools.ablate is made of: the table, the ledger of runs, the effects."""
