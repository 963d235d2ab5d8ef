"""Which rank holds, sees and sends which token. Integers only: no torch."""
