"""Decided in integers, without torch: who holds which token, who looks at whom, who sends what to whom."""
