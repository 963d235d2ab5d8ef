"""The kernels against the fp64 oracle, and every rule and pitfall of the operators behind them."""
