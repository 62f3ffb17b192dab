/* nbdkit-dirty-bitmap-filter
 * SPDX-License-Identifier: BSD-3-Clause
 * Copyright the nbdkit-dirty-bitmap-filter authors
 */

/* The picture of a disk: a grid of what is allocated, one of the same shape
 * for each bitmap, so that the same place is the same offset, and a key.
 *
 * A grid is scaled so that a cell is one unit wide and a row one unit high.
 * All cells of one row and shade are one path, a line whose stroke fills the
 * row.  This keeps the file small.  The title of a row's group is its tooltip.
 *
 * Colours are those of Okabe and Ito, which colour-blind people can tell
 * apart, with lighter and darker shades, which are different in grey, too.
 * Zeroes are a line, thin or thick, in cells without data.
 */

#include <config.h>

#include <stdlib.h>
#include <string.h>

#include "backup/picture.h"
#include "backup/svg.h"
#include "common/cleanup.h"
#include "common/report.h"

/* Pixels.  Two narrow grids and the labels between are as wide as a wide one:
 * GRID_WIDTH = 2 * 128 * 3 + 64 = 128 * 6.5.
 */
#define MARGIN 24
#define LABELS 64
#define GRID_X (MARGIN + LABELS)
#define GRID_WIDTH 832
#define NARROW_WIDTH 384
#define SAMPLES_X (GRID_X + 160)        /* of colours, and what they mean */
#define COLUMN 118              /* from one of these to the next */
#define WIDTH (GRID_X + GRID_WIDTH + MARGIN)

struct shape {
  double cell_width;
  unsigned row_height, bar_height;      /* the rest is a gap */
  unsigned width;                       /* of all columns */
  unsigned rows_per_label;
  unsigned name_columns, name_width;    /* that a name may have */
};
static const struct shape wide = { 6.5, 8, 7, GRID_WIDTH, 4, 76, 600 };
static const struct shape narrow = { 3, 3, 3, NARROW_WIDTH, 8, 28, 226 };

/* So many bitmaps are drawn wide; if there are more, two are side by side. */
#define MAX_WIDE 2

/* How much of a cell is marked.  The class in CSS has this number. */
#define NR_SHADES 5
static const char *const shade_names[NR_SHADES + 1] = {
  NULL, "up to 1 %", "up to 10 %", "up to 50 %", "over 50 %", "all",
};

static const char style[] =
  "text{font:13px Helvetica,Arial,'Liberation Sans','DejaVu Sans',"
  "sans-serif;fill:#1a1a1a}\n"
  ".h1{font-size:20px;font-weight:bold}.b{font-weight:bold}\n"
  ".n{font:bold 13px 'DejaVu Sans Mono',Menlo,Consolas,monospace}\n"
  ".m{fill:#595959}.l{font-size:11px;fill:#595959;text-anchor:end}\n"
  ".e{text-anchor:end}\n"
  "path{fill:none;shape-rendering:crispEdges}\n"
  ".paper{fill:#fff}\n"
  ".r{stroke:#ecece9}\n"
  ".a1{stroke:#bad8ea}.a2{stroke:#8abfde}.a3{stroke:#4a9bcb}"
  ".a4{stroke:#0072b2}.a5{stroke:#004a78}\n"
  ".d1{stroke:#f7c698}.d2{stroke:#f2a665}.d3{stroke:#e68030}"
  ".d4{stroke:#d55e00}.d5{stroke:#9c3d00}\n"
  ".z{stroke:#009e73}\n"
  "@media screen and (prefers-color-scheme:dark){\n"
  "text{fill:#ececec}.m,.l{fill:#a9adb3}.paper{fill:#14171c}\n"
  ".r{stroke:#262b33}\n"
  ".a1{stroke:#1f587a}.a2{stroke:#2571a6}.a3{stroke:#2f8cc9}"
  ".a4{stroke:#56b4e9}.a5{stroke:#a3daf9}\n"
  ".d1{stroke:#7d4114}.d2{stroke:#a5520e}.d3{stroke:#cf5c04}"
  ".d4{stroke:#f08a3c}.d5{stroke:#ffbe8a}\n"
  ".z{stroke:#2fc59b}}\n";

/* What a cell looks like: the number of its shade, or one of these. */
#define LOOK_REST 0
#define LOOK_SOME_ZEROES (NR_SHADES + 1)
#define LOOK_ZEROES (NR_SHADES + 2)

/* Part of a cell, whose bytes are at most 2^63 / 4096. */
static unsigned
look (const struct cells *c, size_t cell)
{
  const uint64_t *bytes = c->bytes[cell], marked = bytes[CELLS_MARKED];
  const uint64_t all = marked + bytes[CELLS_ZERO] + bytes[CELLS_REST];

  if (marked == 0)
    return bytes[CELLS_ZERO] == 0 ? LOOK_REST
      : bytes[CELLS_ZERO] > all / 2 ? LOOK_ZEROES : LOOK_SOME_ZEROES;
  if (marked == all)
    return 5;
  return marked > all / 2 ? 4 : marked > all / 10 ? 3
    : marked > all / 100 ? 2 : 1;
}

/* All cells of a row with one look, as lines. */
static void
draw_looks (FILE *f, const struct cells *c, size_t row, unsigned wanted,
            const char *path)
{
  const size_t first = row * CELLS_COLUMNS, nr = cells_in_row (c, row);
  bool is_open = false;
  size_t next;

  for (size_t i = 0; i < nr; i = next) {
    const unsigned what = look (c, first + i);

    for (next = i + 1; next < nr && look (c, first + next) == what; )
      next++;
    if (what != wanted)
      continue;
    if (!is_open)
      fprintf (f, "<path %s d=\"", path);
    fprintf (f, "M%zu 0h%zu", i, next - i);
    is_open = true;
  }
  if (is_open)
    fputs ("\"/>\n", f);
}

static void
draw_tooltip (FILE *f, const struct cells *c, size_t row, bool is_bitmap)
{
  const size_t first = row * CELLS_COLUMNS, nr = cells_in_row (c, row);
  const uint64_t begin = (uint64_t) first << c->cell_bits;
  uint64_t sum[CELLS_NR_KINDS] = { 0 };
  char from[SVG_NUMBER_CHARS], to[SVG_NUMBER_CHARS];
  char text[CELLS_NR_KINDS][SVG_NUMBER_CHARS];

  for (size_t i = first; i < first + nr; ++i)
    for (unsigned k = 0; k < CELLS_NR_KINDS; ++k)
      sum[k] += c->bytes[i][k];
  for (unsigned k = 0; k < CELLS_NR_KINDS; ++k)
    svg_size (text[k], sum[k]);
  svg_size (from, begin);
  svg_size (to, begin + sum[0] + sum[1] + sum[2]);
  if (is_bitmap)
    fprintf (f, "<title>%s to %s: %s dirty</title>", from, to,
             text[CELLS_MARKED]);
  else
    fprintf (f, "<title>%s to %s: data %s, zeroes %s, holes %s</title>", from,
             to, text[CELLS_MARKED], text[CELLS_ZERO], text[CELLS_REST]);
}

static void
draw_row (FILE *f, const struct cells *c, const struct shape *s, size_t row,
          bool is_bitmap)
{
  fprintf (f, "<g transform=\"translate(0 %g)\">",
           row + s->bar_height / 2.0 / s->row_height);
  draw_tooltip (f, c, row, is_bitmap);
  fprintf (f, "<path class=\"r\" d=\"M0 0h%zu\"/>\n", cells_in_row (c, row));
  draw_looks (f, c, row, LOOK_SOME_ZEROES,
              "class=\"z\" stroke-width=\".125\"");
  draw_looks (f, c, row, LOOK_ZEROES, "class=\"z\" stroke-width=\".375\"");
  for (unsigned i = 1; i <= NR_SHADES; ++i) {
    char path[32];

    snprintf (path, sizeof path, "class=\"%c%u\"", is_bitmap ? 'd' : 'a', i);
    draw_looks (f, c, row, i, path);
  }
  fputs ("</g>\n", f);
}

static unsigned
grid_height (const struct cells *c, const struct shape *s)
{
  return cells_nr_rows (c) * s->row_height;
}

static void
draw_grid (FILE *f, const struct cells *c, const struct shape *s, unsigned x,
           unsigned y, bool is_bitmap)
{
  const size_t nr = cells_nr_rows (c);

  if (nr == 0)
    return;
  for (size_t row = 0; row < nr; row += s->rows_per_label) {
    const uint64_t offset = (uint64_t) row * CELLS_COLUMNS << c->cell_bits;
    char text[SVG_NUMBER_CHARS];

    fprintf (f, "<text class=\"l\" x=\"%u\" y=\"%zu\">%s</text>\n", x - 8,
             y + row * s->row_height + 8,
             offset == 0 ? "0" : svg_size (text, offset));
  }
  fprintf (f, "<g transform=\"translate(%u %u) scale(%g %u)\" "
           "stroke-width=\"%g\">\n", x, y, s->cell_width, s->row_height,
           (double) s->bar_height / s->row_height);
  for (size_t row = 0; row < nr; ++row)
    draw_row (f, c, s, row, is_bitmap);
  fputs ("</g>\n", f);
}

/* A text that does not go beyond its box, whatever its letters are. */
static void
draw_name (FILE *f, const char *name, const char *none, unsigned x,
           unsigned y, unsigned width, size_t columns)
{
  fprintf (f, "<svg x=\"%u\" y=\"%u\" width=\"%u\" height=\"20\">"
           "<text class=\"%s\" y=\"15\" xml:space=\"preserve\">", x, y - 15,
           width, *name == '\0' ? "m" : "n");
  if (*name == '\0')
    fputs (none, f);
  else
    svg_text (f, name, columns);
  fputs ("</text></svg>\n", f);
}

/* Headings. */

#define TOP (MARGIN + 74)       /* of the part on the allocation */

static void
draw_title (FILE *f, const struct map *m)
{
  char size[SVG_NUMBER_CHARS], bytes[SVG_NUMBER_CHARS];
  char cell[SVG_NUMBER_CHARS], row[SVG_NUMBER_CHARS], when[32];

  strftime (when, sizeof when, "%Y-%m-%d %H:%M:%S UTC", &m->when);
  fprintf (f, "<text class=\"h1\" x=\"%u\" y=\"%u\">Map of a disk of %s"
           "</text>\n", GRID_X, MARGIN + 16, svg_size (size, m->size));
  fprintf (f, "<text x=\"%u\" y=\"%u\">Export</text>\n", GRID_X, MARGIN + 40);
  draw_name (f, m->export, "(default)", GRID_X + 46, MARGIN + 40, 520, 66);
  fprintf (f, "<text class=\"m e\" x=\"%u\" y=\"%u\">%s</text>\n",
           GRID_X + GRID_WIDTH, MARGIN + 40, when);
  fprintf (f, "<text class=\"m\" x=\"%u\" y=\"%u\">%s bytes", GRID_X,
           MARGIN + 60, svg_grouped (bytes, m->size));
  if (m->size > 0)
    fprintf (f, "; one cell is %s, one row %s",
             svg_size (cell, UINT64_C (1) << m->allocation.cell_bits),
             svg_size (row, (uint64_t) CELLS_COLUMNS
                       << m->allocation.cell_bits));
  else
    fputs (": there is nothing to draw", f);
  fputs ("</text>\n", f);
}

/* "Data 1.2 GiB, 12 %" after a sample of its colour. */
static void
draw_figure (FILE *f, const struct map *m, unsigned column, const char *name,
             uint64_t bytes, const char *look)
{
  const unsigned x = SAMPLES_X + column * 2 * COLUMN, y = TOP + 16;
  char size[SVG_NUMBER_CHARS], percent[SVG_NUMBER_CHARS];

  fprintf (f, "<path class=\"r\" stroke-width=\"12\" d=\"M%u %uh28\"/>"
           "<path %s d=\"M%u %uh28\"/>\n", x, y - 5, look, x, y - 5);
  fprintf (f, "<text x=\"%u\" y=\"%u\"><tspan class=\"b\">%s</tspan> %s, %s"
           "</text>\n", x + 36, y, name, svg_size (size, bytes),
           svg_percent (percent, bytes, m->size));
}

/* Where the next part begins. */
static unsigned
draw_allocation (FILE *f, const struct map *m)
{
  const struct cells *c = &m->allocation;

  fprintf (f, "<text class=\"b\" x=\"%u\" y=\"%u\">Allocation</text>\n",
           GRID_X, TOP + 16);
  if (!m->has_allocation) {
    fprintf (f, "<text class=\"m\" x=\"%u\" y=\"%u\">The server does not tell "
             "what is allocated: it has no base:allocation.</text>\n",
             GRID_X + 100, TOP + 16);
    return TOP + 40;
  }
  draw_figure (f, m, 0, "Data", c->total[CELLS_MARKED],
               "class=\"a5\" stroke-width=\"12\"");
  draw_figure (f, m, 1, "Zeroes", c->total[CELLS_ZERO],
               "class=\"z\" stroke-width=\"3\"");
  draw_figure (f, m, 2, "Holes", c->total[CELLS_REST],
               "class=\"r\" stroke-width=\"12\"");
  draw_grid (f, c, &wide, GRID_X, TOP + 26, false);
  return TOP + 26 + grid_height (c, &wide) + 28;
}

/* Bitmaps. */

#define HEADING 24              /* from the top of a bitmap to its grid */
#define BELOW 20

static void
draw_bitmap (FILE *f, const struct map *m, const struct map_bitmap *b,
             const struct shape *s, unsigned x, unsigned y)
{
  const uint64_t dirty = b->cells.total[CELLS_MARKED];
  char size[SVG_NUMBER_CHARS], percent[SVG_NUMBER_CHARS];

  fputs ("<g><title>", f);
  svg_text (f, b->name, 0);
  fputs ("</title>\n", f);
  draw_name (f, b->name, "(no name)", x, y + 15, s->name_width,
             s->name_columns);
  fprintf (f, "<text class=\"e\" x=\"%u\" y=\"%u\">%s dirty, %s</text></g>\n",
           x + s->width, y + 15, svg_size (size, dirty),
           svg_percent (percent, dirty, m->size));
  draw_grid (f, &b->cells, s, x, y + HEADING, true);
}

static unsigned
draw_bitmaps (FILE *f, const struct map *m, unsigned y)
{
  const bool is_wide = m->nr_bitmaps <= MAX_WIDE;
  const struct shape *s = is_wide ? &wide : &narrow;
  const unsigned height =
    HEADING + grid_height (&m->allocation, s) + BELOW;

  for (size_t i = 0; i < m->nr_bitmaps; ++i) {
    const bool is_right = !is_wide && i % 2 == 1;

    draw_bitmap (f, m, &m->bitmap[i], s,
                 is_right ? GRID_X + GRID_WIDTH - NARROW_WIDTH : GRID_X, y);
    if (is_wide || is_right || i == m->nr_bitmaps - 1)
      y += height;
  }
  if (m->nr_bitmaps > 0 && m->nr_left_out == 0)
    return y;
  fprintf (f, "<text class=\"m\" x=\"%u\" y=\"%u\">", GRID_X, y + 12);
  if (m->nr_bitmaps == 0)
    fputs ("The server offers no dirty bitmap.", f);
  else
    fprintf (f, "The server offers %zu more bitmap%s.", m->nr_left_out,
             m->nr_left_out == 1 ? "" : "s");
  fputs ("</text>\n", f);
  return y + 32;
}

/* What the shades mean: a line of the key, and where the next one is. */

static void
draw_sample (FILE *f, unsigned column, unsigned y, const char *path,
             const char *name)
{
  const unsigned x = SAMPLES_X + column * COLUMN;

  fprintf (f, "<path class=\"r\" stroke-width=\"12\" d=\"M%u %uh28\"/>"
           "<path %s d=\"M%u %uh28\"/>"
           "<text class=\"m\" x=\"%u\" y=\"%u\">%s</text>\n", x, y - 5, path,
           x, y - 5, x + 36, y, name);
}

static unsigned
draw_key_name (FILE *f, const char *name, unsigned y)
{
  fprintf (f, "<text class=\"m\" x=\"%u\" y=\"%u\">%s</text>\n", GRID_X, y,
           name);
  return y + 20;
}

static unsigned
draw_shades (FILE *f, char letter, const char *name, unsigned y)
{
  for (unsigned i = 1; i <= NR_SHADES; ++i) {
    char path[48];

    snprintf (path, sizeof path, "class=\"%c%u\" stroke-width=\"12\"", letter,
              i);
    draw_sample (f, i - 1, y, path, shade_names[i]);
  }
  return draw_key_name (f, name, y);
}

static unsigned
draw_lines (FILE *f, unsigned y)
{
  draw_sample (f, 2, y, "class=\"z\" stroke-width=\"1\"", "up to 50 %");
  draw_sample (f, 3, y, "class=\"z\" stroke-width=\"3\"", "over 50 %");
  return draw_key_name (f, "Zeroes, no data:", y);
}

static unsigned
draw_key (FILE *f, const struct map *m, unsigned y)
{
  if (m->size == 0)
    return y;
  y += 20;
  if (m->has_allocation) {
    y = draw_shades (f, 'a', "Data in a cell:", y);
    y = draw_lines (f, y);
  }
  if (m->nr_bitmaps > 0)
    y = draw_shades (f, 'd', "Dirty in a cell:", y);
  return y - 10;
}

static void
draw_page (FILE *f, const struct map *m, unsigned *height)
{
  unsigned y;

  draw_title (f, m);
  y = draw_allocation (f, m);
  y = draw_bitmaps (f, m, y);
  *height = draw_key (f, m, y) + MARGIN;
}

/* The page comes first, since its height belongs into the head. */
int
picture_draw (FILE *f, const struct map *m)
{
  CLEANUP_FREE char *page = NULL;
  unsigned height;
  size_t length;
  FILE *memory = open_memstream (&page, &length);

  if (memory == NULL) {
    report_error ("open_memstream: %m");
    return -1;
  }
  draw_page (memory, m, &height);
  if (fclose (memory) == EOF) {
    report_error ("open_memstream: %m");
    return -1;
  }
  fprintf (f, "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n"
           "<svg xmlns=\"http://www.w3.org/2000/svg\" role=\"img\" "
           "width=\"%u\" height=\"%u\" viewBox=\"0 0 %u %u\">\n"
           "<title>Map of a disk</title>\n<style>\n%s</style>\n"
           "<rect class=\"paper\" width=\"%u\" height=\"%u\"/>\n",
           WIDTH, height, WIDTH, height, style, WIDTH, height);
  fwrite (page, 1, length, f);
  fputs ("</svg>\n", f);
  return 0;
}
