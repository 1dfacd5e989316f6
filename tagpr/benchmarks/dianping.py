"""Three tasks in Chinese from users' own posts, as the paper built them from Dianping (S37, appendix H).

The posts cannot be had, so this is a builder: it takes a JSON lines file of posts, ``{user_id, post_id, date, title, content}``,
and makes of every user one row per task. The profile is the user's 8 newest posts and the 9th newest is held out, literally as in
the paper: what is to be written is older than the profile. Wording of the prompts and thresholds of the filters are unstated there
and are ours.

- ``dianping_content``: the post's content from its title.
- ``dianping_title``: the title from the content.
- ``dianping_paraph``: the content from a neutral rewrite of it (:mod:`tagpr.benchmarks.rewriting`).
"""

import hashlib
import heapq
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tagpr.benchmarks.json_objects import read_json_lines
from tagpr.benchmarks.rows import example, is_text
from tagpr.benchmarks.task import Fields, Task
from tagpr.errors import ConfigError, DataError
from tagpr.schema import Example, ProfileItem, Split

PROFILE_POSTS = 8
# The held-out post comes on top of the profile.
POSTS = PROFILE_POSTS + 1

ADVERTISEMENTS = (
    r"https?://|www\.",
    r"(?:加|\+|＋)\s*(?:微信|vx|v信|薇信|qq)",
    r"(?:微信|vx|v信|薇信|qq)\s*(?:号|群)?\s*[:：]?\s*[a-z0-9_-]{5,}",
    r"(?<!\d)1[3-9]\d{9}(?!\d)",
    r"(?:点击|复制).{0,8}链接|加盟热线|代运营|接(?:广告|推广)",
)
"""What advertisements look like: addresses, messenger and telephone numbers, phrases. Regular expressions, any case."""

Rewrite = Callable[[Mapping[str, str]], Mapping[str, str]]
"""Key -> content of a post, to key -> neutral rewrite; a key that is missing in the answer has none."""


@dataclass(frozen=True)
class Selection:
    """Which posts and users are taken; ``users`` of those with enough posts are drawn at random (fewer, if there are fewer)."""

    users: int = 1000
    min_characters: int = 20
    advertisements: tuple[str, ...] = ADVERTISEMENTS
    seed: int = 0


def _render(query: str, items: Sequence[Fields]) -> str:
    if not items:
        return query
    posts = "\n\n".join(f"标题：{item['title']}\n正文：{item['content']}" for item in items)
    return f"以下是同一位用户发布过的帖子：\n\n{posts}\n\n请按照这位用户的写作风格完成下面的任务。\n{query}"


# (what to do, what stands before the text that it is done to)
_QUERIES = {
    "content": ("请根据下面的标题写出帖子的正文。只输出正文，不要解释。", "标题："),
    "title": ("请为下面的帖子拟一个标题。只输出标题，不要解释。", "正文："),
    "paraph": ("请改写下面的帖子。只输出改写后的正文，不要解释。", "帖子："),
}


def _query(kind: str, text: str) -> str:
    order, mark = _QUERIES[kind]
    return f"{order}\n{mark}{text}"


def _query_text(kind: str) -> Callable[[str], str]:
    beginning = _query(kind, "")
    return lambda query: query.removeprefix(beginning)


TASKS: dict[str, Task] = {
    f"dianping_{kind}": Task(
        name=f"dianping_{kind}",
        title=f"Dianping {kind.capitalize()}",
        benchmark="dianping",
        kind="generation",
        labels=(),
        fields=("title", "content"),
        long_field="content",
        metrics=("rouge1", "rougeL"),
        render=_render,
        parse=str.strip,
        query_text=_query_text(kind),
        item_text=lambda item: f"{item['title']} {item['content']}",
        rouge_tokens="characters",
    )
    for kind in _QUERIES
}


@dataclass(frozen=True, order=True)
class _Post:
    """A post; posts of one user order by date, then by place in the file."""

    when: datetime
    line: int
    post_id: str = field(compare=False)
    title: str = field(compare=False)
    content: str = field(compare=False)


def build(
    posts: Path,
    tasks: Sequence[str],
    selection: Selection,
    counts: Counter[str],
    rewrite: Rewrite | None = None,
    split: Split = "test",
) -> Iterator[Example]:
    """Yield the rows of every task, user by user, always the same for a file and a seed.

    Posts are left out and counted if they have no title, content or date (``posts_incomplete``), if their content is shorter than
    ``min_characters`` (``posts_short``) or occurred before, white space aside (``posts_duplicate``), or if they look like
    advertisements (``posts_advertisement``). ``counts`` also gets ``posts_in_file``, ``users_in_file``, ``users_with_few_posts``,
    ``users_not_drawn`` and ``rows_without_rewrite``. Memory holds the 9 newest posts of each user.

    Raises:
        DataError: the file cannot be read, a line is no post, a date is malformed, a post id occurs twice, or no user has
            enough posts; the message names file and line.
        ConfigError: unknown task; ``dianping_paraph`` without ``rewrite``; a setting that makes no sense.
    """
    _check(tasks, selection, rewrite)
    users = _drawn(_newest(posts, selection, counts), selection, counts, posts)
    for name in tasks:
        kind = name.removeprefix("dianping_")
        rewrites: Mapping[str, str] = {}
        if kind == "paraph" and rewrite is not None:
            rewrites = rewrite({newest[0].post_id: newest[0].content for newest in users.values()})
        for user, (held_out, *profile) in users.items():
            given = {"content": held_out.title, "title": held_out.content}.get(
                kind, rewrites.get(held_out.post_id, "")
            )
            if not given.strip():
                counts["rows_without_rewrite"] += 1
                continue
            yield example(
                f"{posts}:{held_out.line}",
                TASKS[name],
                split,
                held_out.post_id,
                query=_query(kind, given),
                gold=held_out.title if kind == "title" else held_out.content,
                profile=[
                    ProfileItem(
                        id=post.post_id,
                        fields={"title": post.title, "content": post.content},
                        date=f"{post.when:%Y-%m-%d}",
                    )
                    for post in profile
                ],
                user_id=user,
            )


def _check(tasks: Sequence[str], selection: Selection, rewrite: Rewrite | None) -> None:
    for name in tasks:
        if name not in TASKS:
            raise ConfigError(f"task={name}: no task of Dianping. Known: {', '.join(TASKS)}.")
    if "dianping_paraph" in tasks and rewrite is None:
        raise ConfigError(
            "benchmark.rewriter: dianping_paraph needs a model that rewrites posts neutrally. Name one, or leave the task out."
        )
    for key in ("users", "min_characters"):
        value = getattr(selection, key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"benchmark.{key}={value}: is not a whole number from 1. Change it.")


def _newest(path: Path, selection: Selection, counts: Counter[str]) -> dict[str, list[_Post]]:
    """Each user's POSTS newest posts, oldest first, and fewer where there are fewer."""
    try:
        advertisement = re.compile("|".join(f"(?:{it})" for it in selection.advertisements), re.IGNORECASE)
    except re.error as error:
        raise ConfigError(f"advertisements: {error} in a regular expression. Mend it.") from None
    users: dict[str, list[_Post]] = {}
    ids: dict[str, int] = {}
    contents: set[bytes] = set()
    for number, raw in _posts(path):
        where = f"{path}:{number}"
        for key in ("user_id", "post_id"):
            if not is_text(raw.get(key)):
                raise DataError(f"{where}: has no {key!r}. Mend the line.")
        post_id = str(raw["post_id"])
        if post_id in ids:
            raise DataError(
                f"{where}: post {post_id!r} is on line {ids[post_id]} too. Remove one of the two."
            )
        ids[post_id] = number
        counts["posts_in_file"] += 1
        newest = users.setdefault(str(raw["user_id"]), [])
        if not all(is_text(raw.get(key)) for key in ("title", "content", "date")):
            counts["posts_incomplete"] += 1
            continue
        post = _Post(_when(raw["date"], where), number, post_id, str(raw["title"]), str(raw["content"]))
        bare = "".join(post.content.split())
        digest = hashlib.blake2b(bare.encode(errors="surrogatepass"), digest_size=16).digest()
        if len(bare) < selection.min_characters:
            counts["posts_short"] += 1
        elif selection.advertisements and advertisement.search(f"{post.title}\n{post.content}"):
            counts["posts_advertisement"] += 1
        elif digest in contents:
            counts["posts_duplicate"] += 1
        else:
            contents.add(digest)
            heapq.heappush(newest, post)
            if len(newest) > POSTS:
                heapq.heappop(newest)
    return {user: sorted(newest) for user, newest in users.items()}


def _drawn(
    users: dict[str, list[_Post]], selection: Selection, counts: Counter[str], path: Path
) -> dict[str, list[_Post]]:
    """The users to take, in the order of the draw; a larger draw only adds to a smaller one."""
    enough = [user for user, newest in users.items() if len(newest) == POSTS]
    counts["users_in_file"] += len(users)
    counts["users_with_few_posts"] += len(users) - len(enough)
    if not enough:
        raise DataError(
            f"{path}: no user has {POSTS} posts that pass the filters. Add posts or relax the filters."
        )

    def rank(user: str) -> bytes:
        return hashlib.sha256(f"{selection.seed}\x00{user}".encode(errors="surrogatepass")).digest()

    taken = sorted(enough, key=rank)[: selection.users]
    counts["users_not_drawn"] += len(enough) - len(taken)
    return {user: users[user] for user in taken}


def _when(date: object, where: str) -> datetime:
    """A date or time in ISO form, in UTC where it names a zone."""
    try:
        when = datetime.fromisoformat(str(date).strip()) if isinstance(date, str) else None
    except ValueError:
        when = None
    if when is None:
        raise DataError(
            f"{where}: date {date!r} is not like 2024-01-31 or 2024-01-31 18:30:00. Mend the line."
        )
    return when.astimezone(UTC).replace(tzinfo=None) if when.tzinfo else when


def _posts(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        yield from read_json_lines(Path(path), "Mend the line.")
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}). Put posts there, one JSON object a line."
        ) from error
