"""What a run costs before it runs: sizes of models, figures of machines, memory, and the roofline. Without torch."""
