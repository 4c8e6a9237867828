"""How fast the operators, the module and whole networks are, how much memory they take, and how both grow.

What is measured is data (:mod:`~freqfusion.benchmarks.cases`); one runner measures it
(:mod:`~freqfusion.benchmarks.runner`). ``docs/benchmarks.md`` states the method.
"""
