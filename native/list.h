/* list.h - intrusive doubly linked lists; a link that is in no list points at itself. */
#ifndef MILLPOND_LIST_H
#define MILLPOND_LIST_H

#include <stdbool.h>
#include <stddef.h>

struct link { struct link *previous, *next; };

#define CONTAINER(link_, type_, member_) \
	((type_ *)(void *)((char *)(link_) - offsetof(type_, member_)))

static inline void list_init(struct link *link)
{
	link->previous = link->next = link;
}
static inline bool list_is_empty(const struct link *list)
{
	return list->next == list;
}
static inline void list_remove(struct link *link)
{
	link->previous->next = link->next;
	link->next->previous = link->previous;
	list_init(link);
}
static inline void list_append(struct link *list, struct link *link)
{
	link->previous = list->previous;
	link->next = list;
	list->previous->next = link;
	list->previous = link;
}

#endif
