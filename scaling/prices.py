"""List prices that the pages show as estimates.

Belongs here: a price with its source, and the product with it. Does not: what was measured or billed.
"""

# S3 Standard, first 50 TB, us-east-1: https://aws.amazon.com/s3/pricing/
USD_PER_GB_MONTH = 0.023


def storage_usd(size: int) -> float:
    """What a month of storage on S3 costs.

    Args:
        size: in bytes.
    """
    return round(size / 1e9 * USD_PER_GB_MONTH, 6)
