"""A group's random numbers go on where they were, are its own, and touch nobody else's."""

import torch

from lct_fast.engine.random_stream import RandomStream

HOST = torch.device("cpu")


def test_a_stream_goes_on_and_leaves_the_rest_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, other = RandomStream(7, 0, HOST), RandomStream(7, 1, HOST)
    drawn = []
    for stream in (one, other, one):
        with stream.active():
            drawn.append(torch.rand(4))
    assert torch.equal(torch.get_rng_state(), before)
    first, elsewhere, second = drawn
    assert not torch.equal(first, second) and not torch.equal(first, elsewhere)
    with RandomStream(7, 0, HOST).active():
        assert torch.equal(torch.rand(4), first) and torch.equal(torch.rand(4), second)
    with RandomStream(8, 0, HOST).active():
        assert not torch.equal(torch.rand(4), first)


def test_a_restored_stream_goes_on() -> None:
    one, again = RandomStream(7, 2, HOST), RandomStream(9, 0, HOST)
    with one.active():
        torch.rand(5)
    again.state = {name: state.clone() for name, state in one.state.items()}
    with one.active():
        expected = torch.rand(5)
    with again.active():
        assert torch.equal(torch.rand(5), expected)


def test_an_error_inside_gives_the_outside_back() -> None:
    before = torch.get_rng_state()
    stream = RandomStream(1, 0, HOST)
    try:
        with stream.active():
            torch.rand(3)
            raise KeyError
    except KeyError:
        pass
    assert torch.equal(torch.get_rng_state(), before)


def test_replicas_draw_different_numbers_and_the_first_those_of_a_run_without() -> None:
    states = [RandomStream(7, 1, HOST, replica).state["cpu"] for replica in range(3)]
    assert torch.equal(states[0], RandomStream(7, 1, HOST).state["cpu"])
    assert not any(torch.equal(a, b) for i, a in enumerate(states) for b in states[:i])


def test_a_new_generator_goes_on_where_the_old_one_is() -> None:
    stream = RandomStream(7, 0, HOST)
    stream.renew()
    assert stream.state.keys() == {"cpu"}
    old = stream._generator = torch.Generator().manual_seed(5)
    torch.rand(3, generator=old)
    stream.renew()
    assert stream._generator is not old
    assert torch.equal(torch.rand(4, generator=stream._generator), torch.rand(4, generator=old))
