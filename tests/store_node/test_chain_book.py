"""The chain book joins the pool's block by block news to whole chains, and offers each that grew once."""

from __future__ import annotations

from kvstore.block import BlockHash
from kvstore.pool.slot_book import CacheChange, CacheEvent
from services.worker.store.chain_book import ChainBook, ChainOffer
from tests.store_node.store_world import chain


def published(hashes: list[BlockHash], after: BlockHash | None = None) -> list[CacheChange]:
    parents = [after, *hashes[:-1]]
    return [CacheChange(*each) for each in zip(hashes, [CacheEvent.PUBLISHED] * len(hashes), parents, strict=True)]


def evicted(*hashes: BlockHash) -> list[CacheChange]:
    return [CacheChange(each, CacheEvent.EVICTED) for each in hashes]


def reused(*hashes: BlockHash) -> list[CacheChange]:
    return [CacheChange(each, CacheEvent.REUSED) for each in hashes]


def test_a_chain_is_offered_once_whole_and_again_from_its_head_when_it_has_grown() -> None:
    book, hashes = ChainBook(100), chain("a", 5)
    book.apply(published(hashes[:3]))
    assert book.take_grown(9) == [ChainOffer(None, tuple(hashes[:3]))]
    assert book.take_grown(9) == []
    book.apply(published(hashes[3:], after=hashes[2]))
    assert book.take_grown(9) == [ChainOffer(None, tuple(hashes))]


def test_chains_that_share_a_head_are_each_offered_to_their_end() -> None:
    book, head = ChainBook(100), chain("a", 2)
    left, right = chain("l", 2), chain("r", 1)
    book.apply([*published(head), *published(left, after=head[1]), *published(right, after=head[1])])
    assert book.take_grown(9) == [ChainOffer(None, (*head, *left)), ChainOffer(None, (*head, *right))]


def test_what_was_evicted_is_offered_no_more_and_a_chain_without_its_head_says_so() -> None:
    book, hashes = ChainBook(100), chain("a", 4)
    book.apply([*published(hashes), *evicted(hashes[3])])
    assert book.take_grown(9) == []
    book.apply([*evicted(hashes[0]), *published(hashes[3:], after=hashes[2])])
    assert book.take_grown(9) == [ChainOffer(hashes[0], tuple(hashes[1:]))]
    assert len(book) == 3


def test_with_only_reused_blocks_a_chain_counts_up_to_its_last_hit() -> None:
    book, hashes = ChainBook(100, only_reused=True), chain("a", 4)
    book.apply(published(hashes))
    assert not book.has_grown
    book.apply(reused(*hashes[:2], *chain("unknown", 1)))
    assert book.take_grown(9) == [ChainOffer(None, tuple(hashes[:2]))]


def test_a_newcomer_is_offered_every_chain() -> None:
    book, first, second = ChainBook(100), chain("a", 3), chain("b", 2)
    book.apply([*published(first), *published(second), *published(chain("c", 1), after=first[0])])
    book.forget_growth()
    book.grow_all()
    assert book.take_grown(9) == [
        ChainOffer(None, tuple(first)),
        ChainOffer(None, tuple(second)),
        ChainOffer(None, (first[0], *chain("c", 1))),
    ]


def test_a_newcomer_is_offered_the_reused_part_of_a_chain_that_goes_on() -> None:
    book, hashes = ChainBook(100, only_reused=True), chain("a", 3)
    book.apply([*published(hashes), *reused(hashes[0])])
    book.forget_growth()
    book.grow_all()
    assert book.take_grown(9) == [ChainOffer(None, (hashes[0],))]


def test_the_book_is_bounded_where_news_of_evictions_were_lost() -> None:
    book = ChainBook(3)
    for name in "abcdef":
        book.apply(published(chain(name, 1)))
    assert len(book) == 3
    assert [offer.hashes for offer in book.take_grown(9)] == [tuple(chain(name, 1)) for name in "def"]
