"""Something to happen in the midst of a training."""


def at_call(monkeypatch, owner, name, number, do):
    """Do something at the n-th call of a function, before it."""
    real, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(None)
        if len(calls) == number:
            do()
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)
