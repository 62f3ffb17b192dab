/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

#ifndef DIRTY_BITMAP_QCOW2_ORDER_H
#define DIRTY_BITMAP_QCOW2_ORDER_H

/* The order of writes, rule by rule.
 *
 * ORDER (RULE) stands before the step that keeps a rule.  It is true and
 * costs nothing, except in a library that is built for the tests alone, with
 * BROKEN_ORDER defined.  There one rule at a time can be broken, and
 * test-crash-order shows for each rule that the crash test notices.
 *
 * Some steps need no rule of their own.  Whatever is released (the old
 * cluster of a write, the old refcount table, bitmap clusters and
 * directories) is not reused before REFERENCES_BEFORE_FREE allows it.  An L1
 * entry and the entries of its new L2 table need no order between them.  A
 * clean stop cuts off only clusters whose refcount is 0, so the cut comes
 * after everything that REFERENCES_BEFORE_FREE waits for.
 */

enum order_rule {
  /* Autoclear bits that a change makes untrue are durably clear before the
   * first change: no program trusts the data they vouch for.
   */
  ORDER_AUTOCLEAR_BEFORE_CHANGE,

  /* The backing file's name is durable in its new place before the header
   * refers to that place: the name is whole in one place or the other.
   */
  ORDER_NAME_BEFORE_OFFSET,

  /* A header extension is durable, with the END marker behind it, before the
   * eight bytes that replace the END marker before it: no program parses an
   * incomplete extension.
   */
  ORDER_EXTENSION_BEFORE_MAGIC,

  /* The bitmaps extension is durable before the autoclear bit that says it
   * can be trusted.
   */
  ORDER_EXTENSION_BEFORE_AUTOCLEAR,

  /* That autoclear bit is durably clear while the extension is patched, if
   * the patch takes more than one sector: no program trusts a mixture.
   */
  ORDER_DISTRUST_WHILE_PATCHING,

  /* A bitmap directory and new bitmap tables are durable, with their
   * refcounts, before the header refers to them.
   */
  ORDER_DIRECTORY_BEFORE_HEADER,

  /* A larger refcount table is durable, with the blocks that count it,
   * before the header refers to it.
   */
  ORDER_TABLE_BEFORE_HEADER,

  /* A refcount block, with its count of itself, is durable before its entry
   * in the refcount table.
   */
  ORDER_BLOCK_BEFORE_TABLE_ENTRY,

  /* If another new block counts it, that block's entry is durable first,
   * too.
   */
  ORDER_COUNTING_ENTRY_FIRST,

  /* Raised refcounts are written before what refers to the clusters: they
   * are never taken for free.
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

  /* A cleared in_use is durable before a flush returns: after a clean stop
   * no bitmap is marked.
   */
  ORDER_SETTLED_BEFORE_RETURN,

  /* A cluster is punched, and its refcount lowered, after the change of the
   * entry that referred to it is durable: no entry leads to what was written
   * there for another purpose.
   */
  ORDER_REFERENCES_BEFORE_FREE,

  /* A cluster that is released during a flush waits for the next flush: the
   * entry may have been changed after its slice was copied.
   */
  ORDER_RELEASED_BEFORE_FLUSH,

  /* A change is marked in the bitmaps before it is made. */
  ORDER_MARK_BEFORE_CHANGE,

  /* in_use is durable before the first change that a bitmap lacks. */
  ORDER_IN_USE_BEFORE_CHANGE,

  /* Bitmap table entries are durable before in_use is cleared. */
  ORDER_ENTRIES_BEFORE_CLEARED,

  /* Bits that a bitmap has ahead of the changes (bitmap/keep.c) are durable
   * before the first change that relies on them.
   */
  ORDER_AHEAD_BEFORE_CHANGE,

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

#endif /* DIRTY_BITMAP_QCOW2_ORDER_H */
