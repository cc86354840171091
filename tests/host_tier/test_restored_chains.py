"""What comes back from the host tier is known as the part of a chain that it is, wherever in the chain it begins."""

from __future__ import annotations

from kvstore.pool.slot_book import CacheChange, CacheEvent
from services.engine.native.memory.host_prefixes import begin_restore
from services.engine.native.scheduling.limits import SchedulerConfig
from services.engine.native.scheduling.scheduler import Scheduler
from tests.host_tier.paged_pool import PagedPool
from tests.tiers.blocks import chain


def test_a_run_from_the_middle_of_a_chain_keeps_its_parent() -> None:
    world = PagedPool(num_blocks=8, num_slots=16)
    scheduler = Scheduler(SchedulerConfig(block_size=4, max_model_len=64, model_fingerprint="ab"), world.pool)
    a = chain("a", 5)
    world.cache(a)
    world.evict_all()
    for start in (2, 0):  # a peer that has the first two asks for the rest; then a prompt wants all
        world.pool.take_changes()
        restore = begin_restore(world.tier, scheduler, a[start:])
        assert restore is not None
        restore.copy_back()
        restore.end()
        published = [change for change in world.pool.take_changes() if change.event is CacheEvent.PUBLISHED]
        expected = [(a[2], a[1]), (a[3], a[2]), (a[4], a[3])] if start else [(a[0], None), (a[1], a[0])]
        assert published == [CacheChange(each, CacheEvent.PUBLISHED, parent) for each, parent in expected]
    world.check_content(a)
    scheduler.check_integrity()
    world.check_integrity()
