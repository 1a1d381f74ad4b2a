def backfilled(months: int, rows: int):
    raise NotImplementedError
