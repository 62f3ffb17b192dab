/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_ORDER_H
#define DIRTY_BITMAP_ORDER_H

/* The order of writes, rule by rule.
 *
 * ORDER (RULE) stands before the step that keeps a rule.  It is true, and
 * costs nothing, but in a library that is built for the tests alone, with
 * BROKEN_ORDER defined: there one rule at a time can be broken, and
 * test-crash-order shows for each that the crash test notices.
 *
 * What needs no rule of its own: what is released (the old cluster of a
 * write, the old refcount table, bitmap clusters and directories) is kept
 * from use by REFERENCES_BEFORE_FREE; an L1 entry and the entries of its
 * new L2 table need no order between them; the cut of the container at a
 * clean stop takes only clusters whose refcount is 0, so it comes after
 * all that rule waits for.
 */

enum order_rule {
  /* Autoclear bits that a change makes untrue are durably clear before
   * the first change: nobody trusts what they stand for.
   */
  ORDER_AUTOCLEAR_BEFORE_CHANGE,

  /* The backing file's name is durable in its new place before the header
   * refers to that: it is whole in one place or the other.
   */
  ORDER_NAME_BEFORE_OFFSET,

  /* A header extension is durable, with the END marker behind it, before
   * the eight bytes that replace the END marker before it: nobody parses
   * what is not one.
   */
  ORDER_EXTENSION_BEFORE_MAGIC,

  /* The bitmaps extension is durable before the autoclear bit that says
   * it can be trusted,
   */
  ORDER_EXTENSION_BEFORE_AUTOCLEAR,

  /* which is durably clear while the extension is patched, if that takes
   * more than one sector: nobody trusts a mixture.
   */
  ORDER_DISTRUST_WHILE_PATCHING,

  /* A bitmap directory and new bitmap tables are durable, with their
   * refcounts, before the header refers to them.
   */
  ORDER_DIRECTORY_BEFORE_HEADER,

  /* So is a larger refcount table, with the blocks that count it. */
  ORDER_TABLE_BEFORE_HEADER,

  /* A refcount block, with its count of itself, is durable before its
   * entry in the refcount table,
   */
  ORDER_BLOCK_BEFORE_TABLE_ENTRY,

  /* and so is the entry of another new block which counts it. */
  ORDER_COUNTING_ENTRY_FIRST,

  /* Refcounts that are raised are written before what refers to the
   * clusters: nobody takes them for free.
   */
  ORDER_REFCOUNTS_BEFORE_REFERENCES,

  /* Guest data, bitmap data, refcounts, and new, zeroed L2 tables are
   * durable before the L2, L1 and bitmap table entries that refer to
   * them; bitmap data is before in_use is cleared.
   */
  ORDER_DATA_BEFORE_REFERENCES,

  /* Those entries are durable before a flush returns, and before in_use
   * is cleared on account of them.
   */
  ORDER_REFERENCES_BEFORE_RETURN,

  /* So is in_use itself: after a clean stop no bitmap is marked. */
  ORDER_SETTLED_BEFORE_RETURN,

  /* A cluster is punched, and its refcount lowered, after the change of
   * the entry that referred to it is durable: nobody reads what somebody
   * else wrote there.
   */
  ORDER_REFERENCES_BEFORE_FREE,

  /* What is released while a flush is under way waits for the next one:
   * the entry may have been changed after its slice was copied.
   */
  ORDER_RELEASED_BEFORE_FLUSH,

  /* A change is marked in the bitmaps before it is made. */
  ORDER_MARK_BEFORE_CHANGE,

  /* in_use is durable before the first change that a bitmap lacks. */
  ORDER_IN_USE_BEFORE_CHANGE,

  /* Bitmap table entries are durable before in_use is cleared. */
  ORDER_ENTRIES_BEFORE_CLEARED,

  /* A request with FUA is durable, with its mark, when it returns. */
  ORDER_FUA_BEFORE_RETURN,

  NR_ORDER_RULES,
};

#ifdef BROKEN_ORDER
extern int broken_order;        /* a rule, or -1 */
#define ORDER(rule) (broken_order != ORDER_##rule)
#else
#define ORDER(rule) 1
#endif

#endif /* DIRTY_BITMAP_ORDER_H */
