"""A deployment that is only computed: real policies and schedulers, modelled time."""
